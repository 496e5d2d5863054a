"""The order of lines: a rule's lines stand together where that changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from surgery.inspection.readable_graph import acts, writes

__all__ = ["DRAWS", "NONE", "WRITES", "effect_of", "in_order"]

NONE, DRAWS, WRITES = range(3)  # what a node does besides giving a value; the last one: or may do


def effect_of(node: fx.Node) -> int:
    return WRITES if writes(node) else DRAWS if acts(node) else NONE


def in_order(
    statements: Sequence[fx.Node], sources: Mapping[fx.Node, Sequence[fx.Node]], effects: Mapping[fx.Node, int]
) -> list[fx.Node]:
    """The forward's own lines as early as may be. `sources`: the lines whose values a line uses.

    A line that may write keeps its place among all lines, and one that draws among those that draw.
    """
    line = {node: index for index, node in enumerate(statements)}
    origins = [node.meta.get("surgery", "") for node in statements]
    needs: list[set[int]] = []
    for index, node in enumerate(statements):
        found = {line[source] for source in sources[node]}
        for before in range(index):
            pair = effects[node], effects[statements[before]]
            if WRITES in pair or pair == (DRAWS, DRAWS):
                found.add(before)
        needs.append(found)
    order: list[int] = []
    done: set[int] = set()
    left = list(range(len(statements)))
    while left:
        now = origins[order[-1]] if order else ""
        ready = [index for index in left if needs[index] <= done]
        order.append(min(ready, key=lambda index: (bool(origins[index]), origins[index] != now, index)))
        done.add(order[-1])
        left.remove(order[-1])
    return [statements[index] for index in order]
