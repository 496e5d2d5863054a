"""Empty fx graphs whose nodes are never called `self`."""

from __future__ import annotations

from torch import fx

__all__ = ["empty_graph"]


def empty_graph() -> fx.Graph:
    """Returns an empty graph that reserves the name `self`, which the generated code needs for the module.

    fx names a node after its target, so the call of a child named `self` would assign to `self`.
    """
    graph = fx.Graph()
    graph._graph_namespace.create_name("self", None)
    return graph
