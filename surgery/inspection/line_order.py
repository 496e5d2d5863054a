"""Orders the lines of a forward so that each rule's lines stand together, if that keeps the results equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from surgery.inspection.readable_graph import acts, writes

__all__ = ["DRAWS", "NONE", "WRITES", "effect_of", "in_order"]

# The effect of a node besides its value: none, drawing random numbers, or (possibly) writing.
NONE, DRAWS, WRITES = range(3)


def effect_of(node: fx.Node) -> int:
    return WRITES if writes(node) else DRAWS if acts(node) else NONE


def in_order(
    statements: Sequence[fx.Node], sources: Mapping[fx.Node, Sequence[fx.Node]], effects: Mapping[fx.Node, int]
) -> list[fx.Node]:
    """Order the lines, with the module's own lines as early as possible. `sources`: the lines whose values a line uses.

    A line that may write keeps its place among all lines. A line that draws random numbers keeps its place among the
    lines that draw.
    """
    line = {node: index for index, node in enumerate(statements)}
    origins = [node.meta.get("surgery", "") for node in statements]
    needs: list[set[int]] = []
    for index, node in enumerate(statements):
        needed = {line[source] for source in sources[node]}
        for before in range(index):
            pair = effects[node], effects[statements[before]]
            if WRITES in pair or pair == (DRAWS, DRAWS):
                needed.add(before)
        needs.append(needed)
    order: list[int] = []
    placed: set[int] = set()
    waiting = list(range(len(statements)))
    while waiting:
        last_origin = origins[order[-1]] if order else ""
        ready = [index for index in waiting if needs[index] <= placed]
        order.append(min(ready, key=lambda index: (bool(origins[index]), origins[index] != last_origin, index)))
        placed.add(order[-1])
        waiting.remove(order[-1])
    return [statements[index] for index in order]
