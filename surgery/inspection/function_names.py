"""Functions and constants as people write them: `F.linear`, `torch.softmax`, a rule's own functions by short names."""

from __future__ import annotations

import builtins
import enum
import functools
import itertools
import keyword
import math
import operator
import re
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["INFIX", "FunctionNames", "identifier"]

# Operators, with how tightly each binds.
INFIX: dict[Any, tuple[str, int]] = {
    operator.or_: ("|", 40), operator.xor: ("^", 45), operator.and_: ("&", 50), operator.lshift: ("<<", 55),
    operator.rshift: (">>", 55), operator.add: ("+", 60), operator.sub: ("-", 60), operator.mul: ("*", 70),
    operator.matmul: ("@", 70), operator.truediv: ("/", 70), operator.floordiv: ("//", 70), operator.mod: ("%", 70),
    operator.pow: ("**", 90), operator.lt: ("<", 30), operator.le: ("<=", 30), operator.gt: (">", 30),
    operator.ge: (">=", 30), operator.eq: ("==", 30), operator.ne: ("!=", 30), operator.is_: ("is", 30),
    operator.is_not: ("is not", 30),
}  # fmt: skip


class FunctionNames:
    """The names of what code uses. `space` is what the code needs besides `torch`, `F`, `nn` and Python's own names."""

    def __init__(self, marks: Collection[str] = ()) -> None:
        self.marks = marks  # of adapters (`Site.mark`): random texts, which are written as names
        self.space: dict[str, Any] = {}
        self.used = {"torch", "F", "nn", "self", "super"}  # names that variables can't have
        self._names: dict[int, str] = {}  # by id; `space` keeps the objects

    def of(self, value: Any) -> str:
        """The name of a function, class or other object; one of its own for each."""
        known = _torch_names().get(id(value)) or self._names.get(id(value))
        if known is None:
            known = self._names[id(value)] = self._put(value)
        self.used.add(known.partition(".")[0])
        return known

    def _put(self, value: Any) -> str:
        name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__name__.lower()
        *outer, last = str(name).rpartition("<locals>.")[2].split(".")
        short = identifier("function" if last == "<lambda>" else last)
        if short not in self.space and short not in _TAKEN:
            self.space[short] = value
            return short
        room = identifier(outer[-1] if outer else str(getattr(value, "__module__", None) or "other").rpartition(".")[2])
        held = self.space.setdefault(room, SimpleNamespace())
        while not isinstance(held, SimpleNamespace) or room in _TAKEN:
            room += "_"
            held = self.space.setdefault(room, SimpleNamespace())
        while hasattr(held, short):
            short += "_"
        setattr(held, short, value)
        return f"{room}.{short}"

    def _mark(self, mark: str) -> str:
        names = (f"mark_{number}" if number > 1 else "mark" for number in itertools.count(1))
        name = next(name for name in names if self.space.get(name, mark) == mark)
        self.space[name] = mark
        self.used.add(name)
        return name

    def constant(self, value: Any) -> str:
        """A value that is no result of an operation, as code."""
        kind = type(value)
        if kind is str and value in self.marks:
            return self._mark(value)
        if value is None or value is Ellipsis or kind in (bool, int, str, bytes, complex):
            return "..." if value is Ellipsis else repr(value)
        if kind is float:
            return repr(value) if math.isfinite(value) else f"float('{value}')"
        if kind in (torch.dtype, torch.memory_format, torch.layout):
            return str(value)
        if kind is torch.device:
            return f"torch.device({str(value)!r})"
        if isinstance(value, enum.Enum):
            return f"{self.of(kind)}.{value.name}"
        return self.of(value)


def identifier(text: str) -> str:
    """A name that code can hold, as near to this text as can be."""
    found = re.sub(r"\W", "_", text)
    return f"_{found}" if not found.isidentifier() or keyword.iskeyword(found) else found


@functools.cache
def _torch_names() -> dict[int, str]:
    """What torch and Python call their functions, by id; the first of these names counts."""
    spaces = {
        "": builtins, "F": F, "torch": torch, "torch.linalg": torch.linalg, "torch.fft": torch.fft,
        "torch.special": torch.special, "torch.autograd": torch.autograd, "torch.nn.utils.rnn": nn.utils.rnn,
        "nn": nn, "math": math, "operator": operator,
    }  # fmt: skip
    found: dict[int, str] = {}
    for prefix, space in spaces.items():
        for name in sorted(vars(space)):
            value = getattr(space, name)
            if not name.startswith("_") and callable(value) and _belongs(value, space):
                found.setdefault(id(value), f"{prefix}.{name}".lstrip("."))
    return found


def _belongs(value: Any, space: Any) -> bool:
    """Whether a module's name for something is the one it is known by, rather than an import of the module's own."""
    module = str(getattr(value, "__module__", None) or "torch")
    return module.partition(".")[0] in ("torch", "builtins", "math", "_operator") and not isinstance(value, type(torch))


_TAKEN = frozenset({"torch", "F", "nn", "math", "operator", "self", *dir(builtins), *keyword.kwlist})
