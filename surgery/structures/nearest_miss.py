"""Why a pattern is not in a graph: the deepest partial match, and the clause at which it ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from surgery.structures.pattern_graph import describe_part
from surgery.structures.search import Search

__all__ = ["nearest_miss"]


def nearest_miss(search: Search) -> str:
    """The deepest partial match, and the clause at which it ends; and modules left out for their exact class."""
    return "; ".join([_nearest(search), *_subclasses(search)])


def _subclasses(search: Search) -> Iterator[str]:
    """A module that would fit by its base class."""
    for part in search.parts:
        if part.operation is not None or part.kind != "operation" or part.asks.get("subclasses"):
            continue
        for node, data in search.data.items():
            if part.is_module(data, subclasses=True) and not part.is_module(data):
                wanted = getattr(part.asks["type"], "__name__", part.asks["type"])
                yield (
                    f"{data['path'] or node} is a {data['type'].__name__}, a subclass of {wanted}: "
                    f"module_of({wanted}, …, subclasses=True) takes subclasses"
                )
                break


def _nearest(search: Search) -> str:
    """The deepest partial match, and the clause at which it ends."""
    total = sum(part.kind == "operation" for part in search.parts)
    best: tuple[int, int, int] | None = None
    place: Any = None
    for index, part in enumerate(search.parts):
        if part.kind != "operation":
            continue
        for node in search.candidates(index):
            search.fits(index, node)
            rank = (search.known[index, node][1], index, -search.order[node])
            if best is None or rank > best:
                best, place = rank, (index, node)
    if best is None:
        return f"the graph has none of the pattern's operations: {describe_part(search.parts, len(search.parts) - 1)}"
    head = f"nearest miss, {best[0]} of {total} operations"
    index, node = place
    if search.known[place][0]:
        above = _user(search, index)
        return f"{head}: {node} fits, and no user of it fits {above}"
    node, why = _failing(search, index, node)
    return f"{head}: at {node}, {why}"


def _user(search: Search, index: int) -> str:
    above = next(iter(search.above[index]), index)
    while search.parts[above].kind != "operation" and search.above[above]:
        above = search.above[above][0]
    return describe_part(search.parts, above)


def _failing(search: Search, index: int, operand: Any) -> tuple[Any, str]:
    """Down the way that fits best, to the clause that fails."""
    owner = index, operand
    while True:
        part = search.parts[index]
        ways = search.ways(index, operand)
        if part.kind == "operation" and (node := search.reached(part, operand)) is not None:
            owner = index, node
            told = search.told(node, part.operation)
            if told is not None and (why := part.mismatch(told.operands, told.keywords)):
                return node, f"{why} in {describe_part(search.parts, index)}"
            if all(search.known[below][0] for below in ways[0]) and part.asks:
                return node, f"{part.refusal(search.data[node])} in {describe_part(search.parts, index)}"
        elif not ways:
            wanted = describe_part(search.parts, index)
            found = search.data[operand]["operation"] if search.has(operand) else repr(operand)
            if search.has(operand):
                return operand, f"{found} stands where {wanted} is asked"
            above, node = owner
            slots = (*search.parts[above].slotted(), *search.parts[above].keywords)
            slot = next((name for name, below in slots if below == index), "in it")
            return node, f"argument {slot} is {found}, and not {wanted}, in {describe_part(search.parts, above)}"
        way = max(ways, key=lambda way: sum(search.known[below][1] for below in way))
        index, operand = next(below for below in way if not search.known[below][0])
