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
from surgery.structures.op_aliases import PASSING, Dim, Implied, ModulePath, is_node
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
        root: The node of the result. With several results: of the first.
        roots: The nodes of all results, in the pattern's order.
        nodes: The nodes of the operations and of those between them, in the graph's order.
        bindings: The pattern's names → nodes, plain values, or paths of modules.
        shared: The nodes, except the results, that are also used outside the match. They stay when it is replaced.
        passed: The nodes between two operations that the pattern does not name, such as dropout and casts.
    """

    root: Any
    nodes: tuple[Any, ...]
    bindings: Mapping[str, Any]
    shared: tuple[Any, ...] = ()
    between: Callable[[], tuple[Any, ...]] = field(default=tuple, compare=False, repr=False)
    roots: tuple[Any, ...] = ()

    @property
    def passed(self) -> tuple[Any, ...]:
        return self.between()

    def mapped(self, convert: Callable[[Any], Any], on_read: Callable[[], None] = lambda: None) -> Occurrence:
        """Returns a copy with converted nodes, such as a rule's values. Reading `passed` calls `on_read`."""
        bindings = {name: convert(value) for name, value in self.bindings.items()}

        def between() -> tuple[Any, ...]:
            on_read()
            return convert(self.passed)

        roots = convert(self.roots)
        return Occurrence(roots[0], convert(self.nodes), bindings, convert(self.shared), between, roots)


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
            of a module. `having` constrains a dtype, a shape or a module. A tuple has several results.

            In a DiGraph, a node has the attribute `operation`, or `binding` (a name, or None for anything), and any of
            the attributes of `having`. `constants` maps positions to plain values. An edge has its position as `slot`.
            The node without outgoing edges is the result.

    Raises:
        SurgeryError: The pattern has branches, cycles or no operation; or a DiGraph has more than one result.

    Note:
        `+` and `*` match in either order. An operation matches in all its spellings: `q @ k.mT` is also an einsum.
        Operations that pass a value on (dropout, casts, `contiguous`) may stand between two operations; the match
        lists them as `passed`. Plain arguments that the pattern does not mention, such as `keepdim`, are ignored.
    """

    def __init__(self, pattern: Callable[..., Any] | networkx.DiGraph):
        self.parts, self.names = parse_pattern(pattern)
        root = len(self.parts) - 1
        self.results = self.parts[root].operands if self.parts[root].kind == "tuple" else (root,)

    def __str__(self) -> str:
        return describe_part(self.parts, len(self.parts) - 1, 20)

    @property
    def unused(self) -> list[str]:
        """The names that occur nowhere in the pattern."""
        used = {part.name for part in self.parts}
        return [name for name in self.names if name not in used]

    def find(self, graph: fx.Graph | fx.GraphModule | networkx.DiGraph) -> Found:
        """Find all matches in a graph, one for each node that can be the result.

        Args:
            graph: A graph of torch.fx, or a result of `as_digraph` or `graph_of`.

        Returns:
            The matches. An empty result is false, and its `reason` describes the nearest miss.

        Raises:
            SurgeryError: Repeated names in long sums leave too many ways to read the pattern.
        """
        digraph = as_digraph(graph) if isinstance(graph, (fx.Graph, torch.nn.Module)) else graph
        search, clashes = Search(self.parts, digraph), list[str]()
        occurrences, node_sets, taken = [], set(), set[Any]()
        first, *others = self.results
        for node in search.roots(first):
            if node in taken or not search.fits(first, node):
                continue
            bound = _bind(search, [(first, node)], clashes)
            if bound is not None and others:
                bound = _bind_others(search, self.results, bound, taken, clashes)
            if bound is None:
                continue
            match = _occurrence(search, bound, self.results, self.names)
            if match.nodes not in node_sets:
                node_sets.add(match.nodes)
                occurrences.append(match)
                taken.update(match.roots if others else ())
        return Found(occurrences, "" if occurrences else (clashes or [nearest_miss(search)])[0])


def _bind_others(
    search: Search, results: tuple[int, ...], bound: dict[int, Any], taken: set[Any], clashes: list[str]
) -> dict[int, Any] | None:
    """Find nodes for the other results of a pattern whose first result is bound; the first that fit are taken."""
    pairs = [(results[0], bound[results[0]])]
    for result in results[1:]:
        used = {node for _, node in pairs} | taken
        known = result in bound
        candidates = [_result(search, result, bound[result])] if known else search.roots(result)
        for node in candidates:
            if node not in used and search.fits(result, node):
                joint = _bind(search, [*pairs, (result, node)], [])
                if joint is not None:
                    pairs, bound = [*pairs, (result, node)], joint
                    break
        else:
            if not clashes:
                part = describe_part(search.parts, result)
                clashes.append(f"{bound[results[0]]} fits the first result, and no node fits {part} together with it")
            return None
    return bound


def _bind(search: Search, results: list[tuple[int, Any]], clashes: list[str]) -> dict[int, Any] | None:
    """Choose among the fitting nodes so that each part and each name is bound to one node."""
    bound: dict[int, Any] = {}
    trail: list[int] = []  # the parts in the order of their binding, to undo
    todo: Any = _onto(results, None)
    choices: list[tuple[Any, int]] = []
    for _ in range(_STEPS):
        if todo is None:
            return bound
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
        elif ok and kind == "operation" and name is not None and not _is_module(search, part, operand, bound):
            ok = False
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
        where=str(results[0][1]),
        why="repeated names occur in many sums and products, and each of these matches in either order",
        fix="split the structure, or use each name once",
    )


def _same(search: Search, value: Any, other: Any) -> bool:
    if is_node(value) and is_node(other):
        return search.source(value) == search.source(other) and _value(search, value) == _value(search, other)
    return is_node(value) == is_node(other) and same_constant(value, other)


def _value(search: Search, node: Any) -> Any:
    """Returns the first node with the value of a node: casts and copies keep it, dropout does not, nor does detach."""
    while not _changes_value(node, search.data[node]["operation"]):
        before = search.passed(node)
        if before is None:
            break
        node = before
    return node


def _changes_value(node: Any, operation: str) -> bool:
    if operation != "dropout" or not isinstance(node, fx.Node) or node.op == "call_module":
        return operation in ("dropout", "detach")
    arguments: dict[str, Any] = dict(zip(("p", "training"), node.args[1:3], strict=False)) | node.kwargs
    return arguments.get("p") != 0 and arguments.get("training", arguments.get("train")) is not False


def _result(search: Search, part: int, operand: Any) -> Any:
    """Returns the node of a result. Inside the match, it may be read through a cast, which other users do not see."""
    return search.reached(search.parts[part], operand) if search.parts[part].kind == "operation" else operand


def _is_module(search: Search, part: int, operand: Any, bound: dict[int, Any]) -> bool:
    """Whether a call is of the same module as the other calls of the pattern's parameter."""
    name, path = search.parts[part].name, _path(search, part, operand)
    return all(_path(search, other, bound[other]) == path for other in bound if search.parts[other].name == name)


def _path(search: Search, part: int, operand: Any) -> ModulePath:
    return ModulePath(search.data[search.reached(search.parts[part], operand)]["path"])


def _occurrence(search: Search, bound: dict[int, Any], results: tuple[int, ...], names: list[str]) -> Occurrence:
    nodes, named, bindings = set[Any](), set[Any](), {}
    roots = tuple([_result(search, result, bound[result]) for result in results])
    for index, part in enumerate(search.parts):
        if index not in bound:
            continue
        if part.kind in ("any", "const") and part.name is not None:
            bindings[part.name] = int(bound[index]) if isinstance(bound[index], Dim) else bound[index]
        if part.kind == "operation":
            if part.name is not None:
                bindings[part.name] = _path(search, index, bound[index])
            node, end = bound[index], search.reached(part, bound[index])
            while node != end:
                nodes.add(node)
                node = search.passed(node)
            within = search.within(end, part.operation)
            nodes |= {end, *within}
            named |= {end, *(inner for inner in within if search.data[inner]["operation"] not in PASSING)}
    ordered = sorted((node for node in nodes if not isinstance(node, Implied)), key=search.order.__getitem__)
    successors = search.graph.successors
    shared = tuple(node for node in ordered if node not in roots and not nodes.issuperset(successors(node)))
    bindings = {name: bindings[name] for name in names if name in bindings}
    passed = tuple(node for node in ordered if node not in named)
    return Occurrence(roots[0], tuple(ordered), bindings, shared, lambda: passed, roots)


_STEPS = 300_000  # about a second


def _onto(way: list[tuple[int, Any]], rest: Any) -> Any:
    for pair in reversed(way):
        rest = (pair, rest)
    return rest
