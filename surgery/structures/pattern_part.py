"""One part of a structural pattern, with its conditions on nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx, nn

from surgery.errors import qualified_name
from surgery.patterns.pattern import Pattern
from surgery.structures.expression import ANY
from surgery.structures.op_aliases import Dim, Implied, LayerTensor, NodeName, flatten

__all__ = ["PatternPart", "describe_part", "is_constant", "same_constant"]


@dataclass(frozen=True)
class PatternPart:
    """One part of a pattern. Its operands are the indices of earlier parts.

    `kind`: "constant" is a fixed plain value, "const" any plain value.
    """

    kind: Literal["operation", "any", "either", "tuple", "constant", "const"]
    operation: str | None = None  # None: a call of a module, which `asks` describes
    operands: tuple[int, ...] = ()
    slots: tuple[int, ...] | None = None  # the positions of the operands; None: the first ones, and no others
    keywords: tuple[tuple[str, int], ...] = ()
    asks: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    value: Any = None

    def children(self) -> Iterator[int]:
        yield from self.operands
        for _, below in self.keywords:
            yield below

    def slot_operands(self) -> Iterator[tuple[int, int]]:
        """Yields the position of each operand with its index."""
        return zip(self.slots if self.slots is not None else range(len(self.operands)), self.operands, strict=True)

    def mismatch(self, operands: tuple, keywords: Mapping[str, Any]) -> str | None:
        """Returns why the number or names of an operation's arguments do not match, or None."""
        last = max((slot for slot, _ in self.slot_operands()), default=-1)
        if last >= len(operands):
            return f"it has {len(operands)} arguments, and not {last + 1}"
        if (
            self.slots is None
            and self.operation is not None
            and any(isinstance(rest, _TENSORS) for rest in operands[last + 1 :])
        ):
            return f"it has {len(operands)} arguments, and not {last + 1}"
        missing = [name for name, _ in self.keywords if name not in keywords]
        return f"it does not have the argument {missing[0]}" if missing else None

    def is_module(self, data: Mapping[str, Any], subclasses: bool = False) -> bool:
        subclasses = subclasses or self.asks.get("subclasses", False)
        return data["op"] == "call_module" and _is_type(data["type"], self.asks["type"], subclasses)

    def refusal(self, data: Mapping[str, Any]) -> str | None:
        """Returns the first attribute of a node that violates a condition, as text, or None."""
        for key, expected in self.asks.items():
            value = data.get(key)
            if key == "subclasses":
                continue
            if key == "type":
                ok = _is_type(value, expected, self.asks.get("subclasses", False))
            elif key == "path":
                ok = value is not None and bool(Pattern.name(expected).match(value, _NOTHING))
            elif key == "shape":
                ok = value is not None and len(value) == len(expected)
                sizes = zip(expected, value or (), strict=False)
                ok = ok and all(size is ANY or size is None or size == actual for size, actual in sizes)
            else:
                ok = value == expected
            if not ok:
                return f"its {key} is {'unknown' if value is None else value}, and not {expected}"
        return None


_NOTHING = nn.Module()
_TENSORS = (fx.Node, NodeName, LayerTensor, Implied)


def _is_type(kind: type | None, expected: type | str, subclasses: bool) -> bool:
    if kind is None:
        return False
    classes = kind.__mro__ if subclasses else (kind,)
    return any(expected in (cls, cls.__name__, qualified_name(cls)) for cls in classes)


def is_constant(operand: Any) -> bool:
    """Whether an operand is a plain value: it does not contain a node or a layer's tensor."""
    return not any(isinstance(item, _TENSORS) for item in flatten(operand))


def same_constant(expected: Any, value: Any) -> bool:
    if isinstance(value, Dim):
        return type(expected) is int and value.is_dim(expected)
    if isinstance(expected, bool) or isinstance(value, bool):
        return expected is value
    return expected == value


def describe_part(parts: list[PatternPart], index: int, depth: int = 2) -> str:
    """Describe a part as text. Deeper parts become `…`."""
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
        expected = part.asks["type"]
        name = expected if isinstance(expected, str) else expected.__name__
    return f"{name}({', '.join(inner)})"
