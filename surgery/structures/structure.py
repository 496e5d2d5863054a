"""`Structure`: patterns of several connected operations, and their search in graphs.

A pattern is a graph of *parts*. The search tests for each pair (part, node) whether the part fits the node, bottom up,
and stores each answer (`Search.fits`), so its work is at most parts × edges. It starts from the pattern's operation
that is rarest in the graph, and climbs to the candidates for the pattern's result. Names that occur twice are bound
last, by a choice among the fitting nodes (`_bind`). Nothing is recursive.
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
from surgery.structures.pattern_graph import parse_pattern
from surgery.structures.pattern_part import describe_part, same_constant
from surgery.structures.search import Search

if TYPE_CHECKING:
    import networkx

__all__ = ["Found", "Occurrence", "Structure"]


@dataclass(frozen=True)
class Occurrence:
    """One match of a structure in a graph.

    Attributes:
        root: The node of the result.
        nodes: The nodes of the operations and of those between them, in the graph's order.
        bindings: The pattern's names → nodes or plain values.
        shared: The nodes, except the root, that are also used outside the match. They stay when it is replaced.
        passed: The nodes between two operations that the pattern does not name, such as dropout and casts.
    """

    root: Any
    nodes: tuple[Any, ...]
    bindings: Mapping[str, Any]
    shared: tuple[Any, ...] = ()
    between: Callable[[], tuple[Any, ...]] = field(default=tuple, compare=False, repr=False)

    @property
    def passed(self) -> tuple[Any, ...]:
        return self.between()

    def mapped(self, convert: Callable[[Any], Any], on_read: Callable[[], None] = lambda: None) -> Occurrence:
        """Returns a copy with converted nodes, such as a rule's values. Reading `passed` calls `on_read`."""
        bindings = {name: convert(value) for name, value in self.bindings.items()}

        def between() -> tuple[Any, ...]:
            on_read()
            return convert(self.passed)

        return Occurrence(convert(self.root), convert(self.nodes), bindings, convert(self.shared), between)


class Found(list[Occurrence]):
    """The matches of a structure, as a list in the graph's order.

    Attributes:
        reason: Why the list is empty: the nearest miss. Empty if there is a match.
    """

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
    >>> matches = attention.find(fx.symbolic_trace(forward))
    >>> matches[0].bindings
    {'q': x, 'k': x, 'v': relu, 'mask': bias}
    >>> print(attention.find(fx.symbolic_trace(lambda x, b: torch.softmax(x @ x.mT / 2 + b, 0) @ x)).reason)
    nearest miss, 2 of 6 operations: at truediv, the pattern wants mul(matmul(q, …), ANY), and the graph has div

    Args:
        pattern: A function of plain PyTorch, or a `networkx.DiGraph`.

            The function's parameters are names that a match binds. A name that occurs twice is one node. `ANY` matches
            anything, `one_of` alternatives, `maybe` an optional operation, `Const` a plain value, `module_of` a call
            of a module. `having` constrains a dtype, a shape or a module.

            In a DiGraph, a node has the attribute `operation`, or `binding` (a name, or None for anything), and any of
            the attributes of `having`. `constants` maps positions to plain values. An edge has its position as `slot`.
            The node without outgoing edges is the result.

    Raises:
        SurgeryError: The pattern has branches, cycles, no operation, or more than one result.

    Note:
        `+` and `*` match in either order. An operation matches in all its spellings: `q @ k.mT` is also an einsum.
        Operations that pass a value on (dropout, casts, `contiguous`) may stand between two operations; the match
        lists them as `passed`. Plain arguments that the pattern does not mention, such as `keepdim`, are ignored.
    """

    def __init__(self, pattern: Callable[..., Any] | networkx.DiGraph):
        self.parts, self.names = parse_pattern(pattern)
        self.root = len(self.parts) - 1

    def __str__(self) -> str:
        return describe_part(self.parts, self.root, 20)

    def find(self, graph: fx.Graph | fx.GraphModule | networkx.DiGraph) -> Found:
        """Find all matches in a graph, one for each root.

        Args:
            graph: A graph of torch.fx, or a result of `as_digraph` or `graph_of`.

        Returns:
            The matches. An empty result is false, and its `reason` describes the nearest miss.

        Raises:
            SurgeryError: Repeated names in long sums leave too many ways to read the pattern.
        """
        digraph = as_digraph(graph) if isinstance(graph, (fx.Graph, torch.nn.Module)) else graph
        search, clashes = Search(self.parts, digraph), list[str]()
        occurrences, node_sets = [], set()
        for node in search.roots():
            match = _bind(search, node, self.names, clashes) if search.fits(self.root, node) else None
            if match is not None and match.nodes not in node_sets:
                node_sets.add(match.nodes)
                occurrences.append(match)
        return Found(occurrences, "" if occurrences else (clashes or [nearest_miss(search)])[0])


def _bind(search: Search, root: Any, names: list[str], clashes: list[str]) -> Occurrence | None:
    """Choose among the fitting nodes so that each part and each name is bound to one node."""
    bound: dict[int, Any] = {}
    trail: list[int] = []  # the parts in the order of their binding, to undo
    todo: Any = ((len(search.parts) - 1, root), None)
    choices: list[tuple[Any, int]] = []
    for _ in range(_STEPS):
        if todo is None:
            return _occurrence(search, bound, root, names)
        (part, operand), todo = todo
        ok = search.answers[part, operand][0]
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
            trail.append(part)
            ways = [way for way in search.ways(part, operand) if all(search.answers[below][0] for below in way)]
            rests = [_onto(way, todo) for way in ways] or [todo]
            choices.extend((rest, len(trail)) for rest in reversed(rests[1:]))
            todo = rests[0]
        if not ok:
            if not choices:
                return None
            todo, length = choices.pop()
            while len(trail) > length:
                del bound[trail.pop()]
    raise SurgeryError(
        "the structure can be read in too many ways",
        where=str(root),
        why="repeated names occur in many sums and products, and each of these matches in either order",
        fix="split the structure, or use each name once",
    )


def _same(search: Search, value: Any, other: Any) -> bool:
    if is_node(value) and is_node(other):
        return search.source(value) == search.source(other)
    return is_node(value) == is_node(other) and same_constant(value, other)


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
