"""The parts of a structural pattern: read from a function or a networkx graph, and what each asks of a node."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from surgery.errors import SurgeryError
from surgery.patterns.pattern import Pattern, qualified_name
from surgery.structures.equivalent_ops import EXPANDED, GATHERED, Meaning, expand, gather
from surgery.structures.expression import ANY, Expression, variable
from surgery.structures.op_aliases import PASSING, Dim, Implied, LayerTensor, NodeName, canonicalise, flatten

if TYPE_CHECKING:
    import networkx

__all__ = ["PatternPart", "is_constant", "parse_pattern", "describe_part", "same_constant"]


@dataclass(frozen=True)
class PatternPart:
    """One part of a pattern; its operands are other parts, by their index, all before its own."""

    kind: str  # operation, any, either, tuple, constant (a given one), const (some constant)
    operation: str | None = None  # None: a call of a module, which `asks` tells
    operands: tuple[int, ...] = ()
    slots: tuple[int, ...] | None = None  # the positions of the operands; None: the first ones, and there are no others
    keywords: tuple[tuple[str, int], ...] = ()
    asks: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    value: Any = None

    def children(self) -> Iterator[int]:
        yield from self.operands
        for _, below in self.keywords:
            yield below

    def slotted(self) -> Iterator[tuple[int, int]]:
        return zip(self.slots if self.slots is not None else range(len(self.operands)), self.operands, strict=True)

    def mismatch(self, given: tuple, keywords: Mapping[str, Any]) -> str | None:
        """Why an operation's arguments can't be those asked for, whatever they are."""
        last = max((slot for slot, _ in self.slotted()), default=-1)
        if last >= len(given):
            return f"it has {len(given)} arguments, and not {last + 1}"
        if (
            self.slots is None
            and self.operation is not None
            and any(isinstance(rest, _TENSORS) for rest in given[last + 1 :])
        ):
            return f"it has {len(given)} arguments, and not {last + 1}"
        missing = [name for name, _ in self.keywords if name not in keywords]
        return f"it has no argument {missing[0]}" if missing else None

    def is_module(self, data: Mapping[str, Any], subclasses: bool = False) -> bool:
        subclasses = subclasses or self.asks.get("subclasses", False)
        return data["op"] == "call_module" and _is_type(data["type"], self.asks["type"], subclasses)

    def refusal(self, data: Mapping[str, Any]) -> str | None:
        """The first attribute of a node that is not as asked."""
        for key, wanted in self.asks.items():
            found = data.get(key)
            if key == "subclasses":
                continue
            if key == "type":
                ok = _is_type(found, wanted, self.asks.get("subclasses", False))
            elif key == "path":
                ok = found is not None and bool(Pattern.name(wanted).match(found, _NOTHING))
            elif key == "shape":
                ok = found is not None and len(found) == len(wanted)
                ok = ok and all(size is ANY or size is None or size == own for size, own in zip(wanted, found or ()))  # noqa: B905
            else:
                ok = found == wanted
            if not ok:
                shown = "not known" if found is None else found
                return f"its {key} is {shown}, and not {wanted}"
        return None


_NOTHING = nn.Module()
_TENSORS = (fx.Node, NodeName, LayerTensor, Implied)


def _is_type(found: type | None, wanted: type | str, subclasses: bool) -> bool:
    if found is None:
        return False
    classes = found.__mro__ if subclasses else (found,)
    return any(wanted in (cls, cls.__name__, qualified_name(cls)) for cls in classes)


def is_constant(operand: Any) -> bool:
    """Whether an operand is a plain value: no node, no tensor that a layer holds, nor anything with such in it."""
    return not any(isinstance(item, _TENSORS) for item in flatten(operand))


def same_constant(wanted: Any, found: Any) -> bool:
    if isinstance(found, Dim):
        return type(wanted) is int and found.is_dim(wanted)
    if isinstance(wanted, bool) or isinstance(found, bool):
        return wanted is found
    return wanted == found


def parse_pattern(pattern: Callable[..., Any] | networkx.DiGraph) -> tuple[list[PatternPart], list[str]]:
    """A pattern's parts, the result last, and the names that it binds."""
    names: list[str] = []
    if callable(pattern):
        parameters = inspect.signature(pattern).parameters
        values = {name: _named(name, parameter.default) for name, parameter in parameters.items()}
        parts = _from_expression(pattern(**values))
        names = [*parameters, *(part.name for part in parts if part.name is not None and part.name not in parameters)]
    elif hasattr(pattern, "predecessors"):
        parts = _from_digraph(pattern)
        names = [part.name for part in parts if part.name is not None]
    else:
        raise SurgeryError(
            f"{pattern!r} is no structure", fix="give a function of plain PyTorch, or a networkx.DiGraph"
        )
    if not any(part.kind == "operation" for part in parts):
        raise SurgeryError("the structure has no operation", fix="write what is to be found, such as q @ k.mT")
    return parts, names


def _from_expression(root: Any) -> list[PatternPart]:
    """Without recursion: an expression is added once all that it is made of is there."""
    parts: list[PatternPart] = []
    known: dict[Any, int] = {}
    alive: list[_Needs] = []  # what `known` tells by its id stays
    waiting: list[tuple[Any, Any]] = [(root, None)]  # values, and what has to be there before them
    while waiting:
        value, needs = waiting.pop()
        key = _key(value)
        if key in known:
            continue
        if needs is None:
            needs = _needs(value)
            alive.append(needs)
            waiting.append((value, needs))
            waiting.extend((inner, None) for inner in needs.inner if _key(inner) not in known)
            continue
        below = tuple(known[_key(inner)] for inner in needs.inner)
        parts.append(needs.part(parts, below))
        known[key] = len(parts) - 1
    return _reachable(parts, known[_key(root)])


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
    """The value that a pattern's function gets for a parameter: one that is a Const by default is bound as such."""
    if isinstance(default, Expression) and default.kind == "const":
        return Expression("const", name, default.args)
    return variable(name)


def _needs(value: Any) -> _Needs:
    """What has to be there before a value's part, and how the part is made then."""
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
        return _Needs(value.args, lambda _, below: PatternPart("operation", None, below, asks=asks))
    if value.kind == "having":
        return _Needs(value.args, lambda parts, below: _asking(parts, below[0], value.of))
    told = canonicalise(value.kind, value.of, value.args, value.kwargs)
    if told.operation in EXPANDED and told.operation != "linear":  # graphs know a linear as such
        meaning = expand(told.operation, told.operands)
        if meaning is not None:
            return _Needs((_written(meaning),), lambda parts, below: parts[below[0]])
    names = tuple(told.keywords)
    count = len(told.operands)

    def made(parts: list[PatternPart], below: tuple[int, ...]) -> PatternPart:
        named = tuple(zip(names, below[count:], strict=True))
        meaning = gather(told.operation, below, _Below(parts)) if told.operation in GATHERED else None
        if meaning is not None and not named:
            return PatternPart("operation", meaning.operation, meaning.operands)
        return PatternPart("operation", told.operation, below[:count], keywords=named)

    return _Needs((*told.operands, *told.keywords.values()), made)


def _written(meaning: Any) -> Any:
    """A meaning as an expression."""
    if not isinstance(meaning, Meaning):
        return meaning
    return Expression("call_method", meaning.operation, tuple(_written(operand) for operand in meaning.operands))


class _Below:
    """A pattern's parts, as `gathered` looks at them: operands are their indices."""

    def __init__(self, parts: list[PatternPart]):
        self.parts = parts

    def read(self, operand: int, operation: str) -> Meaning | None:
        part = self.parts[operand]
        while part.operation in PASSING and part.operation != operation and part.operands:
            part = self.parts[part.operands[0]]
        fits = part.kind == "operation" and part.operation == operation and not part.asks and not part.keywords
        return Meaning(operation, part.operands) if fits else None

    def plain(self, operand: int) -> Any:
        part = self.parts[operand]
        return part.value if part.kind == "constant" else operand

    def same(self, one: Any, other: Any) -> bool:
        return one == other

    def items(self, operand: int) -> tuple[int, ...] | None:
        part = self.parts[operand]
        return part.operands if part.kind == "tuple" else None

    def is_weight(self, operand: int, rank: int) -> bool:
        return False  # a pattern that writes a linear out is found in linears: they are expanded in graphs


def _asking(parts: list[PatternPart], index: int, asks: Mapping[str, Any]) -> PatternPart:
    part = parts[index]
    if part.kind == "either":
        below = []
        for inner in part.operands:
            parts.append(_asking(parts, inner, asks))
            below.append(len(parts) - 1)
        return PatternPart("either", operands=tuple(below))
    if part.kind != "operation":
        raise SurgeryError("having asks about an operation's node", fix="write having(torch.softmax(x, -1), dtype=…)")
    return PatternPart(**{**vars(part), "asks": {**part.asks, **asks}})


def _from_digraph(pattern: Any) -> list[PatternPart]:
    import networkx

    if not networkx.is_directed_acyclic_graph(pattern):
        raise SurgeryError("the structure has a cycle", why="values of a graph are made one after another")
    ends = [node for node in pattern if not pattern.out_degree(node)]
    if len(ends) != 1:
        raise SurgeryError(
            f"the structure has {len(ends)} results: {ends}", fix="leave one node from which no edge goes out"
        )
    parts: list[PatternPart] = []
    known: dict[Any, int] = {}
    for node in networkx.topological_sort(pattern):
        data = dict(pattern.nodes[node])
        operation, constants = data.pop("operation", None), data.pop("constants", {})
        if operation is None and "type" not in data:
            parts.append(PatternPart("any", name=data.get("binding", str(node))))
        else:
            given: dict[int, int] = {}
            for source in pattern.predecessors(node):
                slots = pattern.edges[source, node].get("slots", pattern.edges[source, node].get("slot", len(given)))
                given |= dict.fromkeys(slots if isinstance(slots, tuple) else (slots,), known[source])
            for slot, value in constants.items():
                parts.append(PatternPart("constant", value=value))
                given[slot] = len(parts) - 1
            slots = tuple(sorted(given))
            operands = tuple(given[slot] for slot in slots)
            data.pop("binding", None)
            parts.append(PatternPart("operation", operation, operands, slots, asks=data))
        known[node] = len(parts) - 1
    return parts


def _reachable(parts: list[PatternPart], root: int) -> list[PatternPart]:
    """Without parts that `having` has replaced; the root last."""
    kept, waiting = set(), [root]
    while waiting:
        index = waiting.pop()
        if index not in kept:
            kept.add(index)
            waiting.extend(parts[index].children())
    places = {index: place for place, index in enumerate(sorted(kept))}
    return [
        PatternPart(
            **{
                **vars(parts[index]),
                "operands": tuple(places[below] for below in parts[index].operands),
                "keywords": tuple((name, places[below]) for name, below in parts[index].keywords),
            }
        )
        for index in sorted(kept)
    ]


def describe_part(parts: list[PatternPart], index: int, depth: int = 2) -> str:
    """A part as text, what lies deeper as `…`."""
    part = parts[index]
    if part.kind == "any":
        return part.name or "ANY"
    if part.kind == "const":
        return f"Const({part.name or ''})"
    if part.kind == "constant":
        return repr(part.value)
    if depth == 0:
        return "…"
    inner = [describe_part(parts, below, depth - 1) for below in part.operands]
    inner += [f"{name}={describe_part(parts, below, depth - 1)}" for name, below in part.keywords]
    name = {"either": "one_of", "tuple": ""}.get(part.kind, part.operation)
    if name is None:
        wanted = part.asks["type"]
        name = wanted if isinstance(wanted, str) else wanted.__name__
    return f"{name}({', '.join(inner)})"
