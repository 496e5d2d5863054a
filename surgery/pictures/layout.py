"""Places the boxes of a figure from left to right with graphviz (pygraphviz), and routes its arrows around them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import SurgeryError
from surgery.pictures.figure import Box, Figure
from surgery.pictures.text_size import shorten, text_width

__all__ = ["DETAIL_SIZE", "LINE", "Layout", "Rectangle", "TITLE_SIZE", "place_figure", "shown_text"]

TITLE_SIZE, DETAIL_SIZE, LINE = 13.0, 11.0, 15.0
_PADDING, _SIGN, _LONGEST = 12.0, 26.0, 40
_lock = threading.Lock()  # graphviz keeps a state of its own

Point = tuple[float, float]


@dataclass(frozen=True)
class Rectangle:
    """A box's place: the upper left corner, width and height."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Layout:
    """The places of a figure's boxes by key, and the curve of each arrow, in the order of `Figure.arrows`.

    A curve is a beginning, and three points for each cubic Bézier curve.
    """

    width: float
    height: float
    boxes: Mapping[str, Rectangle]
    arrows: tuple[tuple[Point, ...], ...]


def shown_text(box: Box) -> tuple[str, tuple[str, ...]]:
    """The title and the lines of a box as they are drawn: long texts are cut, and its tensors' state is a line."""
    lines = [shorten(line, _LONGEST) for line in box.details if line]
    if box.trained is not None:
        lines.append("● trained" if box.trained else "○ frozen")
    return shorten(box.title, _LONGEST), tuple(lines)


def _size(box: Box) -> Point:
    if box.kind == "sign" and len(box.title) == 1:
        return _SIGN, _SIGN
    title, lines = shown_text(box)
    widths = [text_width(title, TITLE_SIZE), *(text_width(line, DETAIL_SIZE) for line in lines)]
    return max(36.0, max(widths) + 2 * _PADDING), 32.0 + LINE * len(lines)


def place_figure(figure: Figure) -> Layout:
    """Lay a figure out. Raises `SurgeryError` without pygraphviz."""
    sizes = {box.key: _size(box) for box in figure.boxes}
    names = {box.key: f"n{number}" for number, box in enumerate(figure.boxes)}
    graph = _new_graph()
    for key, (width, height) in sizes.items():
        graph.add_node(names[key], width=f"{width / 72:.4f}", height=f"{height / 72:.4f}")
    boxes_by_key = {box.key: box for box in figure.boxes}
    for box in figure.boxes:
        if box.owner is not None and box.kind == "operation":
            graph.get_node(names[box.key]).attr["group"] = f"{box.owner.rule} {box.owner.adapter}"
    for number, arrow in enumerate(figure.arrows):
        weight = _weight(boxes_by_key[arrow.source], boxes_by_key[arrow.target])
        graph.add_edge(names[arrow.source], names[arrow.target], key=str(number), weight=str(weight))
    with _lock:
        graph.layout(prog="dot")
    _, _, width, height = map(float, graph.graph_attr["bb"].split(","))
    boxes = {}
    for key, (box_width, box_height) in sizes.items():
        x, y = map(float, graph.get_node(names[key]).attr["pos"].split(","))
        boxes[key] = Rectangle(x - box_width / 2, height - y - box_height / 2, box_width, box_height)
    arrows = []
    for number, arrow in enumerate(figure.arrows):
        text = graph.get_edge(names[arrow.source], names[arrow.target], key=str(number)).attr["pos"]
        arrows.append(_curve(text, height))
    return Layout(width, height, boxes, tuple(arrows))


def _weight(source: Box, target: Box) -> int:
    """How much an arrow should be straight: most of all those of the own forward, then those inside a rule."""
    if target.kind == "output" or source.owner is None and (target.owner is None or target.kind == "sign"):
        return 12
    return 6 if source.owner == target.owner and target.kind != "sign" else 1


def _new_graph() -> Any:
    try:
        from pygraphviz import AGraph
    except ImportError:
        raise SurgeryError(
            "pictures need pygraphviz",
            why="it has graphviz, which lays out boxes and arrows",
            fix="pip install 'model-surgery[pictures]', or use surgery.show",
        ) from None
    graph = AGraph(directed=True, strict=False, rankdir="LR", splines="true", nodesep="0.28", ranksep="0.48")
    graph.node_attr.update(label="", shape="box", fixedsize="true")
    graph.edge_attr.update(tailport="e", headport="w", arrowhead="none")
    return graph


def _curve(text: str, height: float) -> tuple[Point, ...]:
    """The points of an arrow from graphviz's text: a beginning, and three more for each cubic Bézier curve."""
    points = (word.split(",") for word in text.split())
    return tuple((float(x), height - float(y)) for x, y in points)
