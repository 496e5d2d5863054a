"""Plain-text tables."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

__all__ = ["is_number_column", "table"]

_LONGEST = 24  # characters of a word that is not cut, to fold a column


def table(head: Sequence[str], rows: Sequence[Sequence[str]], most: int | None = None) -> str:
    """Format rows as aligned columns. Columns of numbers are aligned to the right.

    >>> from surgery.text_table import table
    >>> print(table(["rule", "trainable"], [["lora", "1,024"], ["train", "5"]]))
    rule   trainable
    lora       1,024
    train          5

    `most`: the width from which on the widest columns of texts are folded, so that a row may take several lines.
    Default None: nothing is folded.
    """
    rows = [[str(cell) for cell in row] for row in rows]
    right = [is_number_column(rows, i) for i in range(len(head))]
    widths = [max(len(row[i]) for row in [list(head), *rows]) for i in range(len(head))]
    if most is not None:
        words = [
            max((len(word.rstrip()) for row in rows for word in _words(row[i])), default=0) for i in range(len(head))
        ]
        least = [max(len(name), min(word, _LONGEST)) for name, word in zip(head, words, strict=True)]
        widths = _narrowed(widths, least, right, most)
    lines = [
        line for row in [list(head), *rows] for line in itertools.zip_longest(*map(_folded, row, widths), fillvalue="")
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        )
        for line in lines
    ]
    return "\n".join(text.rstrip() for text in texts)


def is_number_column(rows: Sequence[Sequence[str]], column: int) -> bool:
    """Whether all cells of a column are numbers."""
    return bool(rows) and all(row[column].replace(",", "").rstrip("%").replace(".", "").isdigit() for row in rows)


def _narrowed(widths: Sequence[int], least: Sequence[int], numbers: Sequence[bool], most: int) -> list[int]:
    """The widths of columns, the widest columns of texts narrower until the table fits."""
    widths = list(widths)
    while sum(widths) + 2 * (len(widths) - 1) > most:
        wide = [i for i in range(len(widths)) if not numbers[i] and widths[i] > least[i]]
        if not wide:
            return widths
        widths[max(wide, key=lambda i: widths[i])] -= 1
    return widths


def _folded(text: str, width: int) -> list[str]:
    """The lines of a cell. It breaks after spaces, dots, commas and slashes outside of [], and elsewhere if it must."""
    lines = [""]
    for part in _parts(text, width):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return [line.rstrip() for line in lines]


def _parts(text: str, width: int) -> Iterator[str]:
    for part in _words(text):
        yield from (part[start : start + width] for start in range(0, len(part), max(width, 1)) or [0])


def _words(text: str) -> list[str]:
    """The parts of a text between which a line may break, each with the space after it."""
    return re.split(r"(?<=[\s.,/])(?![^\[]*\])", text)
