"""How far a trace looks into the calls of a forward."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LAYERS", "Depth"]


class Depth(NamedTuple):
    """Which calls are one node, and which are the operations inside.

    `leaves`: whether a function from a registry is one node. `inlined`: the paths of the children whose forwards are
    recorded as operations; every other child is one node.
    """

    leaves: bool = True
    inlined: frozenset[str] = frozenset()


LAYERS = Depth()  # each call is one node
