"""Results of functions: as plain data (`Report`), and as lines and tables (`Displayed`).

A table is plain text, HTML in notebooks, or a table of rich on terminals.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import PurePath
from typing import Any

from surgery.errors import RuleError

__all__ = ["Displayed", "Report", "Table", "escaped", "html_table", "is_number_column", "plain", "table"]

_LONGEST = 24  # characters of a word that is not cut, to fold a column
COLUMNS = 80  # wider tables are folded, unless the terminal is wider, too
_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


# Plain data ----------------------------------------------------------------------------------------------------------


class Report:
    """A base class of results. `to_dict` is plain data, `to_json` is its text, and `to_rows` is for tables.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Count(Report):
    ...     sites: int
    >>> Count(3).to_dict(), Count(3).to_json(indent=None), Count(3).to_rows()
    ({'sites': 3}, '{"sites": 3}', [{'sites': 3}])
    """

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data: mappings, lists, texts and numbers."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # reports are dataclasses
        return {field.name: plain(getattr(self, field.name)) for field in fields}

    def to_json(self, indent: int | None = 2) -> str:
        """The text of `to_dict` as JSON. Numbers that JSON does not have are the texts "nan", "inf" and "-inf"."""
        return json.dumps(plain(self.to_dict()), indent=indent, ensure_ascii=False)

    def to_rows(self) -> list[dict[str, Any]]:
        """Rows with the same columns, each a text, a number or None: `pandas.DataFrame(report.to_rows())`."""
        return [{name: value for name, value in self.to_dict().items() if not isinstance(value, (dict, list))}]


def plain(value: Any) -> Any:
    """A value as JSON data. Rules become their mapping; an object without a form as data becomes its text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())  # type: ignore[attr-defined]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if callable(to_dict := getattr(value, "to_dict", None)):
        try:
            return plain(to_dict())
        except RuleError:  # a rule with a function in a pattern is not data
            return repr(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return str(value)


# Tables --------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]], most: int | None = None) -> str:
    """Format rows as aligned columns. Columns of numbers are aligned to the right.

    >>> from surgery.results import table
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


def _columns() -> int:
    """The width at which tables are folded: that of the terminal, if there is one that is wider than 80 columns."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return max(COLUMNS, shutil.get_terminal_size().columns) if terminal else COLUMNS


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


@dataclass(frozen=True)
class Table:
    """A table of texts. Its plain text is folded to 80 columns. `red`: the numbers of rows that rich prints in red."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    red: frozenset[int] = frozenset()

    def __str__(self) -> str:
        return table(self.head, self.rows, _columns())

    def _repr_html_(self) -> str:
        return html_table(self.head, self.rows)

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        rich_table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for column, name in enumerate(self.head):
            number = is_number_column(self.rows, column)
            rich_table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
        for number, row in enumerate(self.rows):
            cells = map(Text, row)  # texts, so that rich does not read [default] as markup
            rich_table.add_row(*cells, style="red" if number in self.red else None)
        return rich_table


class Displayed:
    """A base class of results that are lines and tables."""

    def _display_parts(self) -> Sequence[str | Table]:
        """The lines and tables of the result."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(map(str, self._display_parts()))

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        parts = self._display_parts()
        return "\n".join(
            part._repr_html_() if isinstance(part, Table) else f'<pre style="margin: 0">{escaped(part)}</pre>'
            for part in parts
        )

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        for part in self._display_parts():
            yield part if isinstance(part, Table) else Text(part)


def escaped(text: str) -> str:
    """A text for HTML and XML. Characters that XML forbids are shown as Python's escapes.

    >>> escaped("a < b"), escaped("bell \\x07")
    ('a &lt; b', 'bell \\\\x07')
    """
    return escape(_NOT_IN_XML.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text))


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], raw: frozenset[int] = frozenset()) -> str:
    """A table as HTML. Texts are escaped; `raw`: columns that are HTML already."""
    numbers = [is_number_column(rows, column) for column in range(len(head))]
    kinds = [' class="n" align="right"' if number else ' align="left"' for number in numbers]
    cells = "".join(f"<th{kind}>{escaped(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    lines = [f"<table><thead><tr>{cells}</tr></thead><tbody>"]
    for row in rows:
        texts = [text if column in raw else escaped(text) for column, text in enumerate(row)]
        lines.append(f"<tr>{''.join(f'<td{k}>{t}</td>' for k, t in zip(kinds, texts, strict=True))}</tr>")
    return "\n".join([*lines, "</tbody></table>"])
