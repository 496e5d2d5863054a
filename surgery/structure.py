"""Structural patterns: several operations and how they hang together, found in graphs.

A pattern is a graph of *parts*. For pairs (part, node) the search asks whether the part fits there, bottom up, and
keeps each answer (`_Search.fits`): so its work is at most parts × edges. It starts from the rarest operation of the
pattern in the graph and climbs from there to where the pattern's result may be. Names that occur twice are settled
last, by choosing among what fits (`_Search.settle`). Nothing is recursive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from surgery.digraph import as_digraph
from surgery.parts import Part, parts_of, reading, same_constant
from surgery.spelling import COMMUTATIVE, PASSING, is_node

if TYPE_CHECKING:
    import networkx

__all__ = ["Found", "Occurrence", "Structure"]


@dataclass(frozen=True)
class Occurrence:
    """One place where a structure is found.

    `nodes`: the nodes of its operations and of what is passed through between them, in the graph's order. `bindings`:
    what the pattern's names stand for, nodes or plain values. `root`: the node of the result. `shared`: those nodes
    but the root that are used outside as well, so that they stay when the structure is replaced.
    """

    root: Any
    nodes: tuple[Any, ...]
    bindings: Mapping[str, Any]
    shared: tuple[Any, ...] = ()


class Found(list[Occurrence]):
    """The occurrences, in the graph's order. Empty, it is falsy, and `reason` says how far the nearest miss went."""

    def __init__(self, occurrences: Iterable[Occurrence] = (), reason: str = ""):
        super().__init__(occurrences)
        self.reason = reason


class Structure:
    """A pattern over several operations, written as plain PyTorch.

    >>> import torch
    >>> from torch import fx
    >>> from surgery import ANY, Structure
    >>> attention = Structure(lambda q, k, v, mask: torch.softmax(q @ k.mT * ANY + mask, -1) @ v)
    >>> def forward(x, bias):
    ...     scores = bias + 0.5 * torch.matmul(x, x.transpose(-2, -1))
    ...     return torch.bmm(scores.softmax(dim=-1), x.relu())
    >>> found = attention.find(fx.symbolic_trace(forward))
    >>> found[0].bindings
    {'q': x, 'k': x, 'v': relu, 'mask': bias}
    >>> print(attention.find(fx.symbolic_trace(lambda x, b: torch.softmax(x @ x.mT / 2 + b, 0) @ x)).reason)
    nearest miss, 2 of 6 operations: at truediv, div stands where mul(matmul(q, …), ANY) is asked

    The function's parameters are names that the match binds; one that occurs twice is one node. `ANY` is anything,
    `one_of` alternatives, `module_of` a call of a module, `having` asks for a dtype, a shape, a module. `+` and `*`
    match either way round; an operation is the same in all its spellings (`surgery.spelling`). Between two operations
    there may be others that hand a value on: dropout, casts, `contiguous`. What the pattern leaves unsaid is not asked:
    further plain arguments of an operation, such as `keepdim`.

    Instead of a function, a `networkx.DiGraph`: a node has the attribute `operation`, or `binding` (a name, or None for
    anything), and any of the attributes that `having` takes; `constants`, a mapping from positions to plain values; an
    edge has its position as `slot`. The node that no edge leaves is the result.

    Raises `SurgeryError` for a pattern with branches, cycles, no operation, or more than one result.
    """

    def __init__(self, pattern: Callable[..., Any] | networkx.DiGraph):
        self.parts, self.names = parts_of(pattern)
        self.root = len(self.parts) - 1

    def __str__(self) -> str:
        return reading(self.parts, self.root, 20)

    def find(self, graph: fx.Graph | fx.GraphModule | networkx.DiGraph) -> Found:
        """All occurrences in a graph of torch.fx, or in what `as_digraph` or `graph_of` gave; one for each root."""
        digraph = as_digraph(graph) if isinstance(graph, (fx.Graph, torch.nn.Module)) else graph
        search = _Search(self.parts, self.names, digraph)
        occurrences, seen = [], set()
        for node in search.roots():
            if search.fits(self.root, node) and (found := search.settle(self.root, node)) and found.nodes not in seen:
                seen.add(found.nodes)
                occurrences.append(found)
        return Found(occurrences, "" if occurrences else search.reason())


@dataclass
class _Search:
    parts: list[Part]
    names: list[str]
    graph: Any
    known: dict[tuple[int, Any], tuple[bool, int]] = field(default_factory=dict)  # whether it fits, operations that do
    clash: str = ""

    def __post_init__(self) -> None:
        self.data: dict[Any, dict[str, Any]] = dict(self.graph.nodes(data=True))
        self.order = {node: index for index, node in enumerate(self.data)}
        self.by_operation: dict[str, list[Any]] = {}
        for node, data in self.data.items():
            self.by_operation.setdefault(data["operation"], []).append(node)
        self.above: list[list[int]] = [[] for _ in self.parts]
        for index, part in enumerate(self.parts):
            for child in part.children():
                self.above[child].append(index)
        self.sources: dict[Any, Any] = {}

    # Where to look ------------------------------------------------------------------------------------------

    def roots(self) -> list[Any]:
        """Nodes where the whole pattern may sit: above the rarest operation that it needs."""
        needed = self.needed()
        if needed:
            rarest = min(needed, key=lambda index: len(self.candidates(index)))
            starts = [(rarest, node) for node in self.candidates(rarest)]
        else:  # alternatives that have nothing in common
            starts = [
                (index, node)
                for index, part in enumerate(self.parts)
                if part.kind == "operation"
                for node in self.candidates(index)
            ]
        root, found, seen = len(self.parts) - 1, set(), set(starts)
        while starts:
            index, node = starts.pop()
            if index == root:
                found.add(node)
                continue
            for pair in self.up(index, node):
                if pair not in seen:
                    seen.add(pair)
                    starts.append(pair)
        return sorted(found, key=self.order.__getitem__)

    def up(self, index: int, node: Any) -> Iterator[tuple[int, Any]]:
        for above in self.above[index]:
            part = self.parts[above]
            if part.kind != "operation":
                yield above, node
                continue
            for user in self.graph.successors(node):
                if self.named(part, user):
                    yield above, user
        for user in self.graph.successors(node):
            if self.data[user]["operation"] in PASSING:
                yield index, user

    def needed(self) -> set[int]:
        """Operations that are in every way to read the pattern."""
        sets: list[set[int]] = []
        for index, part in enumerate(self.parts):
            inner = [sets[child] for child in part.children()]
            if part.kind == "either":
                sets.append(set.intersection(*inner))
            else:
                sets.append(set().union(*inner, {index} if part.kind == "operation" else ()))
        return sets[-1]

    def candidates(self, index: int) -> list[Any]:
        part = self.parts[index]
        if part.operation is not None:
            return self.by_operation.get(part.operation, [])
        return [node for node in self.data if self.named(part, node)]

    def named(self, part: Part, node: Any) -> bool:
        data = self.data[node]
        return part.is_module(data) if part.operation is None else part.operation == data["operation"]

    # What fits ----------------------------------------------------------------------------------------------

    def fits(self, index: int, operand: Any) -> bool:
        stack, known = [(index, operand)], self.known
        while stack:
            pair = stack[-1]
            if pair in known:
                stack.pop()
                continue
            waiting = [below for way in self.ways(*pair) for below in way if below not in known]
            if waiting:
                stack.extend(waiting)
            else:
                known[pair] = self.judged(*pair)
        return known[index, operand][0]

    def judged(self, index: int, operand: Any) -> tuple[bool, int]:
        part = self.parts[index]
        if part.kind == "any":
            return True, 0
        if part.kind == "constant":
            return not is_node(operand) and same_constant(part.value, operand), 0
        here = int(part.kind == "operation" and self.reached(part, operand) is not None)
        best = (False, 0)
        for way in self.ways(index, operand):
            answers = [(self.known[below], self.parts[below[0]].kind == "constant") for below in way]
            wrong = any(plain and not fits for (fits, _), plain in answers)  # an argument of its own is another
            ok = all(fits for (fits, _), _ in answers)
            best = max(best, (ok, here - wrong + sum(count for (_, count), _ in answers)))
        if best[0] and part.asks and part.refusal(self.data[self.reached(part, operand)]):
            return False, best[1] - 1
        return best

    def ways(self, index: int, operand: Any) -> list[list[tuple[int, Any]]]:
        """The ways in which a part can fit, each as what has to fit below; empty where it can't."""
        part = self.parts[index]
        if part.kind == "either":
            return [[(below, operand)] for below in part.operands]
        if part.kind == "tuple":
            fits = isinstance(operand, tuple) and len(operand) == len(part.operands)
            return [list(zip(part.operands, operand, strict=True))] if fits else []
        if part.kind != "operation" or (node := self.reached(part, operand)) is None:
            return []
        data = self.data[node]
        given, keywords = data["operands"], data["keywords"]
        if part.mismatch(given, keywords):
            return []
        named = [(below, keywords[name]) for name, below in part.keywords]
        ways = [[*((below, given[slot]) for slot, below in part.slotted()), *named]]
        if part.operation in COMMUTATIVE and len(given) == 2 and len(part.operands) > 0:
            ways.append([*((below, given[1 - slot]) for slot, below in part.slotted()), *named])
        return ways

    def reached(self, part: Part, operand: Any) -> Any:
        """The node of a part's operation, past what only hands a value on; None where it is another operation."""
        if not self.has(operand):
            return None
        if not self.named(part, operand):
            if part.operation in PASSING or part.operation is None:
                while not self.named(part, operand):
                    before = self.passed(operand)
                    if before is None:
                        return None
                    operand = before
                return operand
            operand = self.source(operand)
        return operand if self.named(part, operand) else None

    def has(self, operand: Any) -> bool:
        return is_node(operand) and operand in self.data

    def passed(self, node: Any) -> Any:
        """What a node hands on, or None."""
        data = self.data[node]
        first = data["operands"][0] if data["operation"] in PASSING and data["operands"] else None
        return first if self.has(first) else None

    def source(self, node: Any) -> Any:
        path = []
        while node not in self.sources and (before := self.passed(node)) is not None:
            path.append(node)
            node = before
        found = self.sources.get(node, node)
        self.sources.update(dict.fromkeys(path, found))
        return found

    # Which of it at once ------------------------------------------------------------------------------------

    def settle(self, index: int, node: Any) -> Occurrence | None:
        """A choice among what fits in which each part and each name stands for one node."""
        bound: dict[int, Any] = {}
        made: list[int] = []  # the parts in the order in which they were bound, to take back
        todo: Any = ((index, node), None)
        choices: list[tuple[Any, int]] = []
        while todo is not None:
            (part, operand), todo = todo
            ok = self.known[part, operand][0]
            kind, name = self.parts[part].kind, self.parts[part].name
            if ok and (kind in ("constant", "tuple") or kind == "any" and name is None):
                todo = _onto(self.ways(part, operand)[0], todo) if kind == "tuple" else todo
            elif ok and part in bound:
                ok = self.same(bound[part], operand)
                if not ok:
                    places = f"{bound[part]} at one place and {operand} at another"
                    self.clash = self.clash or f"{reading(self.parts, part)} would be {places}"
            elif ok:
                bound[part] = operand
                made.append(part)
                ways = [way for way in self.ways(part, operand) if all(self.known[below][0] for below in way)]
                rests = [_onto(way, todo) for way in ways] or [todo]
                choices.extend((rest, len(made)) for rest in reversed(rests[1:]))
                todo = rests[0]
            if not ok:
                if not choices:
                    return None
                todo, length = choices.pop()
                while len(made) > length:
                    del bound[made.pop()]
        return self.occurrence(bound, node)

    def same(self, one: Any, other: Any) -> bool:
        if is_node(one) and is_node(other):
            return self.source(one) == self.source(other)
        return is_node(one) == is_node(other) and same_constant(one, other)

    def occurrence(self, bound: dict[int, Any], root: Any) -> Occurrence:
        nodes, bindings = set(), {}
        for index, part in enumerate(self.parts):
            if index not in bound:
                continue
            if part.kind == "any" and part.name is not None:
                bindings[part.name] = bound[index]
            if part.kind == "operation":
                node, end = bound[index], self.reached(part, bound[index])
                while node != end:
                    nodes.add(node)
                    node = self.passed(node)
                nodes.add(end)
        ordered = tuple(sorted(nodes, key=self.order.__getitem__))
        shared = (node for node in ordered if node != root and not nodes.issuperset(self.graph.successors(node)))
        bindings = {name: bindings[name] for name in self.names if name in bindings}
        return Occurrence(root, ordered, bindings, tuple(shared))

    # Why not ------------------------------------------------------------------------------------------------

    def reason(self) -> str:
        """The deepest partial match, and the clause at which it ends."""
        if self.clash:
            return self.clash
        total = sum(part.kind == "operation" for part in self.parts)
        best: tuple[int, int, int] | None = None
        place: Any = None
        for index, part in enumerate(self.parts):
            if part.kind != "operation":
                continue
            for node in self.candidates(index):
                self.fits(index, node)
                rank = (self.known[index, node][1], index, -self.order[node])
                if best is None or rank > best:
                    best, place = rank, (index, node)
        if best is None:
            return f"the graph has none of the pattern's operations: {reading(self.parts, len(self.parts) - 1)}"
        head = f"nearest miss, {best[0]} of {total} operations"
        index, node = place
        if self.known[place][0]:
            above = self.up_text(index)
            return f"{head}: {node} fits, and no user of it fits {above}"
        node, why = self.failing(index, node)
        return f"{head}: at {node}, {why}"

    def up_text(self, index: int) -> str:
        above = next(iter(self.above[index]), index)
        while self.parts[above].kind != "operation" and self.above[above]:
            above = self.above[above][0]
        return reading(self.parts, above)

    def failing(self, index: int, operand: Any) -> tuple[Any, str]:
        """Down the way that fits best, to the clause that fails."""
        owner = index, operand
        while True:
            part = self.parts[index]
            ways = self.ways(index, operand)
            if part.kind == "operation" and (node := self.reached(part, operand)) is not None:
                owner = index, node
                if why := part.mismatch(self.data[node]["operands"], self.data[node]["keywords"]):
                    return node, f"{why} in {reading(self.parts, index)}"
                if all(self.known[below][0] for below in ways[0]) and part.asks:
                    return node, f"{part.refusal(self.data[node])} in {reading(self.parts, index)}"
            elif not ways:
                wanted = reading(self.parts, index)
                found = self.data[operand]["operation"] if self.has(operand) else repr(operand)
                if self.has(operand):
                    return operand, f"{found} stands where {wanted} is asked"
                above, node = owner
                slot = next((i for i, below in self.parts[above].slotted() if below == index), "")
                return node, f"argument {slot} is {found}, and not {wanted}, in {reading(self.parts, above)}"
            way = max(ways, key=lambda way: sum(self.known[below][1] for below in way))
            index, operand = next(below for below in way if not self.known[below][0])


def _onto(way: list[tuple[int, Any]], rest: Any) -> Any:
    for pair in reversed(way):
        rest = (pair, rest)
    return rest
