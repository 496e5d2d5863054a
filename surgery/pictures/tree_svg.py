"""Renders a model's tree as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgery.pictures.figure import Owner
from surgery.pictures.svg import document
from surgery.pictures.text_size import shorten, text_width
from surgery.pictures.tree import Mark, TreeRow
from surgery.results import escaped

__all__ = ["LEGEND", "short_number", "tree_svg"]

LEGEND = "outline: live · dashed outline: idle · filled: merged into the weights · ●: trains"

_ROW, _INDENT, _MARGIN = 26.0, 18.0, 20.0


def short_number(value: int) -> str:
    """A number with three digits and a unit: 11.9M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def tree_svg(title: str, rows: Sequence[TreeRow], colours: Mapping[Owner, int]) -> str:
    """The picture of a tree: names and types on the left, shapes and parameters, and the rules of each site."""
    names = [shorten(row.name, 48) for row in rows]
    types = [shorten(row.type, 32) for row in rows]
    name_widths = [
        row.depth * _INDENT + text_width(name, 13) + 10 + text_width(kind, 11) + (44 if row.repeats > 1 else 0)
        for row, name, kind in zip(rows, names, types, strict=True)
    ]
    shapes_at = _MARGIN + max(name_widths) + 24
    numbers_at = shapes_at + max([text_width(row.shape, 11) for row in rows] + [50]) + 70
    marks_at = numbers_at + 16
    parts = [f'<text class="sg-head sg-ink" x="{_MARGIN:.0f}" y="30">{escaped(shorten(title, 90))}</text>']
    parts.append(_text("parameters", numbers_at, 50, "sg-detail sg-soft sg-end-text"))
    right, top = marks_at, 58.0
    parts += _guides(rows, top)
    for number, (row, name, kind) in enumerate(zip(rows, names, types, strict=True)):
        y = top + number * _ROW + 17
        x = _MARGIN + row.depth * _INDENT
        parts.append(_text(name, x, y, "sg-title sg-ink"))
        x += text_width(name, 13) + 8
        if row.repeats > 1:
            times = f"× {row.repeats}"
            width = text_width(times, 11) + 12
            parts.append(f'<rect class="sg-base" x="{x:.1f}" y="{y - 13:.1f}" width="{width:.1f}" height="17" rx="8"/>')
            parts.append(_text(times, x + width / 2, y - 0.5, "sg-detail sg-ink sg-mid"))
            x += width + 8
        more = f" … {row.folded} modules" if row.folded else ""
        parts.append(_text(kind + more, x, y, "sg-detail sg-soft"))
        parts.append(_text(row.shape, shapes_at, y, "sg-detail sg-soft"))
        if row.numbers:
            trained = "● " if row.trained else ""
            parts.append(_text(trained + short_number(row.numbers), numbers_at, y, "sg-detail sg-soft sg-end-text"))
        x = marks_at
        for mark in row.marks:
            x = _chip(parts, mark, x, y, colours)
        right = max(right, x)
    bottom = top + len(rows) * _ROW + 26
    parts.append(_text(LEGEND, _MARGIN, bottom, "sg-detail sg-soft"))
    right = max(right, _MARGIN + text_width(LEGEND, 11))
    return document(parts, right + _MARGIN, bottom + 18, title)


def _chip(parts: list[str], mark: Mark, x: float, y: float, colours: Mapping[Owner, int]) -> float:
    """Add a rule's mark; return where the next one begins."""
    trained = (
        f" ● {short_number(mark.trained)}" if mark.trained else f" {short_number(mark.added)}" if mark.added else ""
    )
    state = "" if mark.state == "live" else f", {mark.state}"
    text = f"{shorten(mark.owner.rule, 28)} [{shorten(mark.owner.adapter, 24)}{state}]{trained}"
    width = text_width(text, 11) + 16
    style = {"live": "sg-mark", "idle": "sg-mark sg-frozen", "merged": "sg-filled"}[mark.state]
    number = colours.get(mark.owner, 0)
    place = f'x="{x:.1f}" y="{y - 15:.1f}" width="{width:.1f}" height="21" rx="10"'
    parts.append(f'<rect class="sg-own sg-box {style} sg-c{number}" {place}/>')
    parts.append(_text(text, x + width / 2, y, "sg-detail sg-ink sg-mid"))
    return x + width + 8


def _guides(rows: Sequence[TreeRow], top: float) -> list[str]:
    """A line from each module to the modules below."""
    parts: list[str] = []
    ends: dict[int, float] = {}  # where the line to the next module of each depth goes on
    for number, row in enumerate(rows):
        y = top + number * _ROW + 13
        if row.depth:
            x = _MARGIN + (row.depth - 1) * _INDENT + 5
            parts.append(f'<path class="sg-guide sg-line" d="M{x:.1f} {ends[row.depth]:.1f}V{y:.1f}H{x + 9:.1f}"/>')
        ends[row.depth], ends[row.depth + 1] = y, y + 10
    return parts


def _text(text: str, x: float, y: float, classes: str) -> str:
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}">{escaped(text)}</text>' if text else ""
