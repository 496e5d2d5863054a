"""`Displayed`: results made of lines and tables, as plain text, in notebooks (HTML), and on terminals with rich."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from surgery.text_table import is_number_column, table

__all__ = ["Displayed", "Table", "escaped", "html_table"]

COLUMNS = 80  # of a terminal; wider tables are folded


@dataclass(frozen=True)
class Table:
    """A table of texts. Its plain text is folded to 80 columns. `red`: the numbers of rows that rich prints in red."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    red: frozenset[int] = frozenset()

    def __str__(self) -> str:
        return table(self.head, self.rows, COLUMNS)

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


_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


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
