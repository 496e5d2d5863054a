"""Structural patterns: several operations and how they hang together, found in graphs.

A pattern is a graph of *parts*. For pairs (part, node) the search asks whether the part fits there, bottom up, and
keeps each answer (`Search.fits`): so its work is at most parts × edges. It starts from the rarest operation of the
pattern in the graph and climbs from there to where the pattern's result may be. Names that occur twice are settled
last, by choosing among what fits (`_settled`). Nothing is recursive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from surgery.errors import SurgeryError
from surgery.structures.fx_digraph import as_digraph
from surgery.structures.nearest_miss import nearest_miss
from surgery.structures.op_aliases import PASSING, Dim, Implied, is_node
from surgery.structures.pattern_graph import describe_part, parse_pattern, same_constant
from surgery.structures.search import Search

if TYPE_CHECKING:
    import networkx

__all__ = ["Found", "Occurrence", "Structure"]


@dataclass(frozen=True)
class Occurrence:
    """One place where a structure is found.

    `nodes`: the nodes of its operations and of what is passed through between them, in the graph's order. `bindings`:
    what the pattern's names stand for, nodes or plain values. `root`: the node of the result. `shared`: those nodes
    but the root that are used outside as well, so that they stay when the structure is replaced. `passed`: those nodes
    that the pattern does not name, such as dropout and casts between two operations.
    """

    root: Any
    nodes: tuple[Any, ...]
    bindings: Mapping[str, Any]
    shared: tuple[Any, ...] = ()
    between: Callable[[], tuple[Any, ...]] = field(default=tuple, compare=False, repr=False)

    @property
    def passed(self) -> tuple[Any, ...]:
        return self.between()

    def mapped(self, shown: Callable[[Any], Any], asked: Callable[[], None] = lambda: None) -> Occurrence:
        """The same with other things in the place of nodes: values, for rules. `asked` is called for `passed`."""
        bindings = {name: shown(value) for name, value in self.bindings.items()}

        def between() -> tuple[Any, ...]:
            asked()
            return shown(self.passed)

        return Occurrence(shown(self.root), shown(self.nodes), bindings, shown(self.shared), between)


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
    `one_of` alternatives, `maybe` an operation that may be left out, `Const` a plain value, `module_of` a call of a
    module, `having` asks for a dtype, a shape, a module. `+` and `*` match either way round; an operation is the same
    in all its spellings (`surgery.structures.op_aliases`, `surgery.structures.equivalent_ops`): `q @ k.mT` is also an
    einsum. Between two operations there may be others that hand a value on: dropout, casts, `contiguous`; the match
    lists them as `passed`. What the pattern leaves unsaid is not asked: further plain arguments of an operation, such
    as `keepdim`.

    Instead of a function, a `networkx.DiGraph`: a node has the attribute `operation`, or `binding` (a name, or None for
    anything), and any of the attributes that `having` takes; `constants`, a mapping from positions to plain values; an
    edge has its position as `slot`. The node that no edge leaves is the result.

    Raises `SurgeryError` for a pattern with branches, cycles, no operation, or more than one result; `find`, where
    repeated names in long sums leave too many ways to read it.
    """

    def __init__(self, pattern: Callable[..., Any] | networkx.DiGraph):
        self.parts, self.names = parse_pattern(pattern)
        self.root = len(self.parts) - 1

    def __str__(self) -> str:
        return describe_part(self.parts, self.root, 20)

    def find(self, graph: fx.Graph | fx.GraphModule | networkx.DiGraph) -> Found:
        """All occurrences in a graph of torch.fx, or in what `as_digraph` or `graph_of` gave; one for each root."""
        digraph = as_digraph(graph) if isinstance(graph, (fx.Graph, torch.nn.Module)) else graph
        search, clashes = Search(self.parts, digraph), list[str]()
        occurrences, seen = [], set()
        for node in search.roots():
            found = _settled(search, node, self.names, clashes) if search.fits(self.root, node) else None
            if found is not None and found.nodes not in seen:
                seen.add(found.nodes)
                occurrences.append(found)
        return Found(occurrences, "" if occurrences else (clashes or [nearest_miss(search)])[0])


def _settled(search: Search, root: Any, names: list[str], clashes: list[str]) -> Occurrence | None:
    """A choice among what fits in which each part and each name stands for one node."""
    bound: dict[int, Any] = {}
    made: list[int] = []  # the parts in the order in which they were bound, to take back
    todo: Any = ((len(search.parts) - 1, root), None)
    choices: list[tuple[Any, int]] = []
    for _ in range(_STEPS):
        if todo is None:
            return _occurrence(search, bound, root, names)
        (part, operand), todo = todo
        ok = search.known[part, operand][0]
        kind, name = search.parts[part].kind, search.parts[part].name
        if ok and (kind in ("constant", "tuple") or kind in ("any", "const") and name is None):
            todo = _onto(search.ways(part, operand)[0], todo) if kind == "tuple" else todo
        elif ok and part in bound:
            ok = _same(search, bound[part], operand)
            if not ok:
                places = f"{bound[part]} at one place and {operand} at another"
                clashes.append(f"{describe_part(search.parts, part)} would be {places}")
        elif ok:
            bound[part] = operand
            made.append(part)
            ways = [way for way in search.ways(part, operand) if all(search.known[below][0] for below in way)]
            rests = [_onto(way, todo) for way in ways] or [todo]
            choices.extend((rest, len(made)) for rest in reversed(rests[1:]))
            todo = rests[0]
        if not ok:
            if not choices:
                return None
            todo, length = choices.pop()
            while len(made) > length:
                del bound[made.pop()]
    raise SurgeryError(
        "the structure can be read in too many ways",
        where=str(root),
        why="names that occur several times stand in many sums and products, each of which may be read either way",
        fix="split the structure, or use each name once",
    )


def _same(search: Search, one: Any, other: Any) -> bool:
    if is_node(one) and is_node(other):
        return search.source(one) == search.source(other)
    return is_node(one) == is_node(other) and same_constant(one, other)


def _occurrence(search: Search, bound: dict[int, Any], root: Any, names: list[str]) -> Occurrence:
    nodes, named, bindings = set[Any](), set[Any](), {}
    for index, part in enumerate(search.parts):
        if index not in bound:
            continue
        if part.kind in ("any", "const") and part.name is not None:
            bindings[part.name] = int(bound[index]) if isinstance(bound[index], Dim) else bound[index]
        if part.kind == "operation":
            node, end = bound[index], search.reached(part, bound[index])
            while node != end:
                nodes.add(node)
                node = search.passed(node)
            within = search.within(end, part.operation)
            nodes |= {end, *within}
            named |= {end, *(inner for inner in within if search.data[inner]["operation"] not in PASSING)}
    ordered = sorted((node for node in nodes if not isinstance(node, Implied)), key=search.order.__getitem__)
    shared = tuple(node for node in ordered if node != root and not nodes.issuperset(search.graph.successors(node)))
    bindings = {name: bindings[name] for name in names if name in bindings}
    passed = tuple(node for node in ordered if node not in named)
    return Occurrence(root, tuple(ordered), bindings, shared, lambda: passed)


_STEPS = 300_000  # about a second


def _onto(way: list[tuple[int, Any]], rest: Any) -> Any:
    for pair in reversed(way):
        rest = (pair, rest)
    return rest
