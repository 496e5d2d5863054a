"""Reads a structural pattern, a function or a networkx graph, as a list of parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.structures.equivalent_ops import EXPANDED, GATHERED, Meaning, expand, gather
from surgery.structures.expression import Expression, variable
from surgery.structures.op_aliases import PASSING, canonicalise
from surgery.structures.pattern_part import PatternPart

if TYPE_CHECKING:
    import networkx

__all__ = ["parse_pattern"]


def parse_pattern(pattern: Callable[..., Any] | networkx.DiGraph) -> tuple[list[PatternPart], list[str]]:
    """Read a pattern: returns its parts, the result last, and the names that it binds."""
    names: list[str] = []
    if callable(pattern):
        parameters = inspect.signature(pattern).parameters
        values = {name: _named(name, parameter.default) for name, parameter in parameters.items()}
        parts = _from_expression(_as_result(pattern(**values)))
        names = [*parameters, *(part.name for part in parts if part.name is not None and part.name not in parameters)]
    elif hasattr(pattern, "predecessors"):
        parts = _from_digraph(pattern)
        names = [part.name for part in parts if part.name is not None]
    else:
        raise SurgeryError(
            f"{pattern!r} is not a structure", fix="pass a function of plain PyTorch, or a networkx.DiGraph"
        )
    if not any(part.kind == "operation" for part in parts):
        raise SurgeryError("the structure does not have an operation", fix="write operations to find, such as q @ k.mT")
    return parts, names


def _from_expression(root: Any) -> list[PatternPart]:
    """Add the parts of an expression without recursion: operands before the operation."""
    parts: list[PatternPart] = []
    indices: dict[Any, int] = {}
    alive: list[_Needs] = []  # keeps objects alive whose ids are keys of `indices`
    waiting: list[tuple[Any, Any]] = [(root, None)]  # values, and the operands that must precede them
    while waiting:
        value, needs = waiting.pop()
        key = _key(value)
        if key in indices:
            continue
        if needs is None:
            needs = _needs(value)
            alive.append(needs)
            waiting.append((value, needs))
            waiting.extend((inner, None) for inner in needs.inner if _key(inner) not in indices)
            continue
        below = tuple(indices[_key(inner)] for inner in needs.inner)
        parts.append(needs.part(parts, below))
        indices[key] = len(parts) - 1
    return _reachable(parts, indices[_key(root)])


def _as_result(value: Any) -> Any:
    """Returns what a pattern's function returned: one result, or a tuple of results."""
    if not isinstance(value, (tuple, list)):
        return value
    wrong = [item for item in value if not isinstance(item, Expression) or item.kind in ("any", "const")]
    if wrong or not value:
        raise SurgeryError(
            f"a result of the structure is {wrong[0]!r}" if wrong else "the structure has no result",
            why="each result of a structure is the value of an operation",
            fix="return the operations' values: return q, k",
        )
    return value[0] if len(value) == 1 else tuple(value)


def _key(value: Any) -> Any:
    if isinstance(value, Expression):
        named = value.kind == "const" and value.of is not None
        return ("const", value.of) if named else ("expression", id(value))
    if isinstance(value, tuple):
        return ("tuple", *map(_key, value))
    return ("constant", type(value), value)


@dataclass(frozen=True)
class _Needs:
    inner: tuple[Any, ...]
    part: Callable[[list[PatternPart], tuple[int, ...]], PatternPart]


def _named(name: str, default: Any) -> Expression:
    """Returns the value for a parameter of a pattern. A default that is a Const or a module gets the name."""
    if isinstance(default, Expression) and default.kind == "const":
        return Expression("const", name, default.args)
    if isinstance(default, Expression) and default.kind == "module" and not default.args:
        return Expression("module", default.of, (), {**default.kwargs, "name": name})
    return variable(name)


def _needs(value: Any) -> _Needs:
    """Returns the operands of a value, and a function that creates its part from their indices."""
    if isinstance(value, tuple):
        return _Needs(value, lambda _, below: PatternPart("tuple", operands=below))
    if not isinstance(value, Expression):
        return _Needs((), lambda _, below: PatternPart("constant", value=value))
    if value.kind == "any":
        return _Needs((), lambda _, below: PatternPart("any", name=value.of))
    if value.kind == "const":
        return _Needs((), lambda _, below: PatternPart("const", name=value.of, value=value.args[0]))
    if value.kind == "either":
        return _Needs(value.args, lambda _, below: PatternPart("either", operands=below))
    if value.kind == "module":
        asks = {"type": value.of, **value.kwargs}
        name = asks.pop("name", None)
        return _Needs(value.args, lambda _, below: PatternPart("operation", None, below, asks=asks, name=name))
    if value.kind == "having":
        return _Needs(value.args, lambda parts, below: _asking(parts, below[0], value.of))
    op = canonicalise(value.kind, value.of, value.args, value.kwargs)
    if op.operation in EXPANDED and op.operation != "linear":  # a linear stays one operation in graphs
        meaning = expand(op.operation, op.operands)
        if meaning is not None:
            return _Needs((_to_expression(meaning),), lambda parts, below: parts[below[0]])
    names = tuple(op.keywords)
    count = len(op.operands)

    def make_part(parts: list[PatternPart], below: tuple[int, ...]) -> PatternPart:
        named = tuple(zip(names, below[count:], strict=True))
        meaning = gather(op.operation, below, _Below(parts)) if op.operation in GATHERED else None
        if meaning is not None and not named:
            return PatternPart("operation", meaning.operation, meaning.operands)
        return PatternPart("operation", op.operation, below[:count], keywords=named)

    return _Needs((*op.operands, *op.keywords.values()), make_part)


def _to_expression(meaning: Any) -> Any:
    """Convert a meaning to an expression."""
    if not isinstance(meaning, Meaning):
        return meaning
    return Expression("call_method", meaning.operation, tuple(_to_expression(operand) for operand in meaning.operands))


class _Below:
    """A pattern's parts as `Terms` for `gather`. Operands are indices of parts."""

    def __init__(self, parts: list[PatternPart]):
        self.parts = parts

    def read(self, operand: int, operation: str) -> Meaning | None:
        part = self.parts[operand]
        while part.operation in PASSING and part.operation != operation and part.operands:
            part = self.parts[part.operands[0]]
        fits = part.kind == "operation" and part.operation == operation and not part.asks and not part.keywords
        return Meaning(operation, part.operands) if fits else None

    def constant(self, operand: int) -> Any:
        part = self.parts[operand]
        return part.value if part.kind == "constant" else operand

    def same(self, value: Any, other: Any) -> bool:
        return value == other

    def items(self, operand: int) -> tuple[int, ...] | None:
        part = self.parts[operand]
        return part.operands if part.kind == "tuple" else None

    def is_weight(self, operand: int, rank: int) -> bool:
        return False  # a pattern that writes a linear as a product still matches: graphs expand their linears


def _asking(parts: list[PatternPart], index: int, asks: Mapping[str, Any]) -> PatternPart:
    part = parts[index]
    if part.kind == "either":
        below = []
        for inner in part.operands:
            parts.append(_asking(parts, inner, asks))
            below.append(len(parts) - 1)
        return PatternPart("either", operands=tuple(below))
    if part.kind != "operation":
        raise SurgeryError("having needs an operation", fix="write having(torch.softmax(x, -1), dtype=…)")
    return PatternPart(**{**vars(part), "asks": {**part.asks, **asks}})


def _from_digraph(pattern: Any) -> list[PatternPart]:
    import networkx

    if not networkx.is_directed_acyclic_graph(pattern):
        raise SurgeryError("the structure has a cycle", why="a graph computes its values one after another")
    ends = [node for node in pattern if not pattern.out_degree(node)]
    if len(ends) != 1:
        raise SurgeryError(
            f"the structure has {len(ends)} results: {ends}", fix="leave one node without outgoing edges"
        )
    parts: list[PatternPart] = []
    indices: dict[Any, int] = {}
    for node in networkx.topological_sort(pattern):
        data = dict(pattern.nodes[node])
        operation, constants = data.pop("operation", None), data.pop("constants", {})
        if operation is None and "type" not in data:
            parts.append(PatternPart("any", name=data.get("binding", str(node))))
        else:
            inputs: dict[int, int] = {}
            for source in pattern.predecessors(node):
                slots = pattern.edges[source, node].get("slots", pattern.edges[source, node].get("slot", len(inputs)))
                inputs |= dict.fromkeys(slots if isinstance(slots, tuple) else (slots,), indices[source])
            for slot, value in constants.items():
                parts.append(PatternPart("constant", value=value))
                inputs[slot] = len(parts) - 1
            slots = tuple(sorted(inputs))
            operands = tuple(inputs[slot] for slot in slots)
            data.pop("binding", None)
            parts.append(PatternPart("operation", operation, operands, slots, asks=data))
        indices[node] = len(parts) - 1
    return parts


def _reachable(parts: list[PatternPart], root: int) -> list[PatternPart]:
    """Remove parts that `having` has replaced. The root stays last."""
    reached, waiting = set(), [root]
    while waiting:
        index = waiting.pop()
        if index not in reached:
            reached.add(index)
            waiting.extend(parts[index].children())
    places = {index: place for place, index in enumerate(sorted(reached))}
    return [
        PatternPart(
            **{
                **vars(parts[index]),
                "operands": tuple(places[below] for below in parts[index].operands),
                "keywords": tuple((name, places[below]) for name, below in parts[index].keywords),
            }
        )
        for index in sorted(reached)
    ]
