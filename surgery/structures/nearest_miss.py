"""Explains why a pattern is not in a graph: the deepest partial match, and the clause that fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from surgery.structures.pattern_part import describe_part
from surgery.structures.search import Search

__all__ = ["nearest_miss"]


def nearest_miss(search: Search) -> str:
    """Describe the deepest partial match with the clause that fails, and modules that only a subclass test rejects."""
    return "; ".join([_nearest(search), *_subclasses(search)])


def _subclasses(search: Search) -> Iterator[str]:
    """Yields a text for each module that would fit by its base class."""
    for part in search.parts:
        if part.operation is not None or part.kind != "operation" or part.asks.get("subclasses"):
            continue
        for node, data in search.data.items():
            if part.is_module(data, subclasses=True) and not part.is_module(data):
                expected = getattr(part.asks["type"], "__name__", part.asks["type"])
                yield (
                    f"{data['path'] or node} is a {data['type'].__name__}, a subclass of {expected}: "
                    f"module_of({expected}, …, subclasses=True) takes subclasses"
                )
                break


def _nearest(search: Search) -> str:
    """Describe the deepest partial match, and the clause that fails."""
    total = sum(part.kind == "operation" for part in search.parts)
    best: tuple[bool, int, int, int] | None = None
    place: Any = None
    above = _above_rarest(search)
    for index, part in enumerate(search.parts):
        if part.kind != "operation":
            continue
        for node in search.candidates(index):
            search.fits(index, node)
            rank = (index in above, search.answers[index, node][1], index, -search.order[node])
            if best is None or rank > best:
                best, place = rank, (index, node)
    if best is None:
        pattern = describe_part(search.parts, len(search.parts) - 1)
        return f"the graph does not have any of the pattern's operations: {pattern}"
    head = f"nearest miss, {best[1]} of {total} operations"
    index, node = place
    if search.answers[place][0]:
        above = _user(search, index)
        return f"{head}: {node} fits, and no user of it fits {above}"
    node, why = _failing(search, index, node)
    return f"{head}: at {node}, {why}"


def _above_rarest(search: Search) -> set[int]:
    """Returns the parts that contain the operation that the pattern always needs and the graph has least often.

    A partial match with it says more than a larger one without it, such as a product of matrices without a softmax.
    """
    names: list[set[str]] = []  # the operations that each part needs
    for part in search.parts:
        below = [names[child] for child in part.children()]
        own = {part.operation} if part.kind == "operation" and part.operation is not None else set[str]()
        names.append(set.intersection(*below) if part.kind == "either" else own.union(*below))
    counts = {name: len(nodes) for name in names[-1] if (nodes := search.by_operation.get(name))}
    if not counts:
        return set()
    rarest = min(sorted(counts), key=counts.__getitem__)
    return {index for index, needed in enumerate(names) if rarest in needed}


def _user(search: Search, index: int) -> str:
    above = next(iter(search.above[index]), index)
    while search.parts[above].kind != "operation" and search.above[above]:
        above = search.above[above][0]
    return describe_part(search.parts, above)


def _failing(search: Search, index: int, operand: Any) -> tuple[Any, str]:
    """Follow the best partial match down to the clause that fails."""
    owner = index, operand
    while True:
        part = search.parts[index]
        ways = search.ways(index, operand)
        if part.kind == "operation" and (node := search.reached(part, operand)) is not None:
            owner = index, node
            op = search.as_operation(node, part.operation)
            if op is not None and (why := part.mismatch(op.operands, op.keywords)):
                return node, f"{why} in {describe_part(search.parts, index)}"
            if all(search.answers[below][0] for below in ways[0]) and part.asks:
                return node, f"{part.refusal(search.data[node])} in {describe_part(search.parts, index)}"
        elif not ways:
            expected = describe_part(search.parts, index)
            if search.has(operand):
                return operand, f"the pattern wants {expected}, and the graph has {search.data[operand]['operation']}"
            above, node = owner
            slots = (*search.parts[above].slot_operands(), *search.parts[above].keywords)
            slot = next((name for name, below in slots if below == index), "in it")
            return node, f"argument {slot} is {operand!r}, and not {expected}, in {describe_part(search.parts, above)}"
        way = max(ways, key=lambda way: sum(search.answers[below][1] for below in way))
        index, operand = next(below for below in way if not search.answers[below][0])
