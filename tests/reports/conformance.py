"""`make peers`: run every row of tests/support/conformance.py and write docs/reference/peft-checkpoints.md."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

import surgery.rules  # noqa: F401  # brings the methods
from tests.support import ROOT
from tests.support.conformance import CELLS, ROWS, check

PAGE = ROOT / "docs/reference/peft-checkpoints.md"
MARKS = ("<!-- made by make peers -->\n", "<!-- end -->")


def table(results: Mapping[int, Mapping[str, str]]) -> str:
    """One line per row; a failed cell is ✗ with the reason."""
    head = "| method | model: configuration | PEFT → here | … merged | … removed | here → PEFT | trained | notes |"
    lines = [head, "|---" * 8 + "|"]
    for i, row in enumerate(ROWS):
        failures = results.get(i, {})
        if row.refused:
            cells, note = ["refused"] * len(CELLS), f"`{row.refused[0]}`: {row.refused[1]}"
        else:
            texts = {cell: "✓" if cell in ("removed", "trained") else row.cell for cell in CELLS}
            if row.unmerged:
                texts["merged"] = "–"
            if row.untrained:
                texts["trained"] = f"– {row.untrained}"
            cells, note = [f"✗ {failures[cell]}" if failures.get(cell) else texts[cell] for cell in CELLS], row.note
        if any(failures.values()) and row.refused:
            cells = ["✗"] * len(CELLS)
        name = row.name.replace("|", "\\|").replace("_", "\\_").replace("*", "\\*")
        lines.append(f"| {row.method} | {name} | {' | '.join(cells)} | {note} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[int, dict[str, str]] = {}
    for i, row in enumerate(ROWS):
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            try:
                results[i] = check(row, Path(folder))
            except Exception as error:
                results[i] = dict.fromkeys([*CELLS], f"{type(error).__name__}: {error}".splitlines()[0])
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(MARKS[0])
    PAGE.write_text(before + MARKS[0] + table(results) + MARKS[1] + rest.partition(MARKS[1])[2], encoding="utf-8")
    wrong = sum(bool(why) for row in results.values() for why in row.values())
    print(f"{len(ROWS)} rows, {len(ROWS) * len(CELLS)} cells, {wrong} that do not hold")


if __name__ == "__main__":
    main()
