"""The data of a picture: boxes, arrows, and the figures of one site. No positions and no colours."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Arrow", "Box", "Figure", "Owner", "SiteFigure"]


@dataclass(frozen=True)
class Owner:
    """The rule of an adapter that put a box into a forward, or whose tensors the box uses."""

    adapter: str
    rule: str


@dataclass(frozen=True)
class Box:
    """One step of a forward.

    `kind`: "input", "output", "operation", "sign" (a small box such as +), "tensors" (adapter tensors that a function
    of the forward takes) or "folded" (several operations of the own forward). `trained`: whether its adapter tensors
    train; None if it has none. `details`: further lines. `owner`: None for what the module's own forward does.
    """

    key: str
    kind: str
    title: str
    details: tuple[str, ...] = ()
    owner: Owner | None = None
    trained: bool | None = None


@dataclass(frozen=True)
class Arrow:
    source: str
    target: str


@dataclass(frozen=True)
class Figure:
    """One forward as a graph."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]

    def owners(self) -> list[Owner]:
        """The rules with boxes in the figure, in order."""
        return list(dict.fromkeys(box.owner for box in self.boxes if box.owner is not None))


@dataclass(frozen=True)
class SiteFigure:
    """A site before and after: `before` is None if it was not asked for.

    `formulas`: the first line of each live rule's docstring. `notes`: its idle and merged rules, and adapters' weights.
    """

    path: str
    module: str
    before: Figure | None
    after: Figure
    formulas: tuple[tuple[Owner, str], ...]
    notes: tuple[str, ...]
