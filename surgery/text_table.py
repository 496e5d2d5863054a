"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["table"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format rows as aligned columns. Columns of numbers are aligned to the right.

    >>> from surgery.text_table import table
    >>> print(table(["rule", "trainable"], [["lora", "1,024"], ["train", "5"]]))
    rule   trainable
    lora       1,024
    train          5
    """
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *rows]) for i in range(len(head))]
    right = [
        bool(rows) and all(row[i].replace(",", "").rstrip("%").replace(".", "").isdigit() for row in rows)
        for i in range(len(head))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        for row in [list(head), *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)
