"""Renders site figures as SVG text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from surgery.pictures.figure import Box, Figure, Owner, SiteFigure
from surgery.pictures.layout import LINE, TITLE_SIZE, Layout, Point, Rectangle, place_figure, shown_text
from surgery.pictures.style import css
from surgery.pictures.text_size import shorten, text_width
from surgery.results import escaped

__all__ = ["document", "site_svg"]

_MARGIN, _GAP, _HEAD = 20.0, 56.0, 26.0
_BESIDE = 1130.0  # pixels; a wider picture has the figures below each other


def document(parts: Sequence[str], width: float, height: float, label: str, styled: bool = True) -> str:
    """An SVG document around elements. `label` is read to people who don't see it. `styled`: with its own style."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="sg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escaped(label)}">',
            *([f"<style>{css()}</style>"] if styled else []),
            f'<rect class="sg-paper" width="{width:.0f}" height="{height:.0f}"/>',
            *parts,
            "</svg>",
        ]
    )


def site_svg(site: SiteFigure, colours: Mapping[Owner, int], styled: bool = True) -> str:
    """The picture of a site: a heading, its figures, and below them a line for each rule.

    `styled`: with a style of its own, which a page with `css()` does not need.
    """
    title = f"{site.path or 'the model itself'} ({site.module})"
    figures = [("before", site.before), ("after", site.after)] if site.before is not None else [("", site.after)]
    placed = [(head, figure, place_figure(figure)) for head, figure in figures if figure is not None]
    total = sum(layout.width for _, _, layout in placed) + _GAP * (len(placed) - 1)
    beside = total <= _BESIDE
    parts = [_text(shorten(title, 90), _MARGIN, 30, "sg-head sg-ink")]
    x, y, right, bottom = _MARGIN, 50.0, text_width(shorten(title, 90), 15.0), 50.0
    tallest = max(layout.height for _, _, layout in placed)
    for head, figure, layout in placed:
        top = y
        if head:
            parts.append(_text(head, x, top + 12, "sg-detail sg-soft"))
            top += _HEAD
        parts += _figure(figure, layout, x, top + (max(0.0, tallest - layout.height) / 2 if beside else 0.0), colours)
        right = max(right, x + layout.width)
        bottom = max(bottom, top + (tallest if beside else layout.height))
        x, y = (x + layout.width + _GAP, y) if beside else (x, bottom + 24)
    right = max(right, 420.0)
    y = bottom + 30
    for owner, text in [*site.formulas, *((None, note) for note in site.notes)]:
        y = _caption(parts, owner, text, y, right, colours)
    return document(parts, right + _MARGIN, y, f"{title}: {', '.join(text for _, text in site.formulas)}", styled)


def _caption(
    parts: list[str], owner: Owner | None, text: str, y: float, right: float, colours: Mapping[Owner, int]
) -> float:
    """Add the lines of a rule's formula, or of a note; return where the next begins."""
    x = _MARGIN
    if owner is not None:
        number = colours.get(owner, 0)
        parts.append(
            f'<rect class="sg-own sg-box sg-c{number}" x="{x:.0f}" y="{y - 10:.0f}" width="12" height="12" rx="3"/>'
        )
        text = f"{owner.rule} [{owner.adapter}]: {text}"
    for line in textwrap.wrap(text, max(40, int((right - x - 20) / 6.0))):
        parts.append(_text(line, x + (20 if owner is not None else 0), y, "sg-detail sg-soft"))
        y += LINE
    return y + 5


def _figure(figure: Figure, layout: Layout, x: float, y: float, colours: Mapping[Owner, int]) -> list[str]:
    boxes = {box.key: box for box in figure.boxes}
    parts = [f'<g transform="translate({x:.1f} {y:.1f})">']
    for arrow, points in zip(figure.arrows, layout.arrows, strict=True):
        owner = boxes[arrow.target].owner if boxes[arrow.source].owner is None else boxes[arrow.source].owner
        ours = owner is not None and (boxes[arrow.source].owner or boxes[arrow.target].kind != "sign")
        number = colours.get(owner) if ours and owner is not None else None
        parts += _arrow(points, number)
    for box in figure.boxes:
        parts += _box(box, layout.boxes[box.key], colours)
    return [*parts, "</g>"]


def _arrow(points: Sequence[Point], colour: int | None) -> list[str]:
    """A curve, and its tip as a shape: markers would be shared between the pictures of a page."""
    *begin, (x, y) = points
    x1, y1 = next((p for p in reversed(begin) if abs(p[0] - x) + abs(p[1] - y) > 1.0), begin[0])
    length = ((x - x1) ** 2 + (y - y1) ** 2) ** 0.5 or 1.0
    dx, dy = (x - x1) / length, (y - y1) / length
    back = (x - 7 * dx, y - 7 * dy)
    head, *rest = [*begin, back]
    line = f"M{_at(head)}" + "".join(f"C{' '.join(map(_at, rest[n : n + 3]))}" for n in range(0, len(rest), 3))
    left, right = (back[0] - 3.5 * dy, back[1] + 3.5 * dx), (back[0] + 3.5 * dy, back[1] - 3.5 * dx)
    stroke, fill = ("sg-line", "sg-tip") if colour is None else (f"sg-l{colour}", f"sg-t{colour}")
    return [
        f'<path class="sg-arrow {stroke}" d="{line}"/>',
        f'<path class="{fill}" d="M{_at((x, y))}L{_at(left)}L{_at(right)}z"/>',
    ]


def _at(point: Point) -> str:
    return f"{point[0]:.1f} {point[1]:.1f}"


def _box(box: Box, at: Rectangle, colours: Mapping[Owner, int]) -> list[str]:
    title, lines = shown_text(box)
    place = f'x="{at.x:.1f}" y="{at.y:.1f}" width="{at.width:.1f}" height="{at.height:.1f}"'
    middle = at.x + at.width / 2
    number = colours.get(box.owner) if box.owner is not None else None
    if box.kind in ("input", "output"):
        shape = f'<rect class="sg-end" {place}/>'
    else:
        frozen = " sg-frozen" if box.trained is False and number is not None else ""
        colour = f"sg-own sg-c{number}" if number is not None else "sg-base"
        radius = at.height / 2 if box.kind == "sign" and len(box.title) == 1 else 7
        shape = f'<rect class="sg-box {colour}{frozen}" {place} rx="{radius:.0f}"/>'
    top = at.y + (at.height - LINE * len(lines)) / 2
    parts = [shape, _text(title, middle, top + TITLE_SIZE * 0.36, "sg-title sg-ink sg-mid")]
    for number, line in enumerate(lines):
        parts.append(_text(line, middle, top + LINE * (number + 1) + 3, "sg-detail sg-soft sg-mid"))
    return parts


def _text(text: str, x: float, y: float, classes: str) -> str:
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}">{escaped(text)}</text>'
