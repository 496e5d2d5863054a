"""Names functions and constants in code for people: `F.linear`, `torch.softmax`, a rule's functions by short names."""

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

# Each operator with its sign and its precedence; a higher number binds tighter.
INFIX: dict[Any, tuple[str, int]] = {
    operator.or_: ("|", 40), operator.xor: ("^", 45), operator.and_: ("&", 50), operator.lshift: ("<<", 55),
    operator.rshift: (">>", 55), operator.add: ("+", 60), operator.sub: ("-", 60), operator.mul: ("*", 70),
    operator.matmul: ("@", 70), operator.truediv: ("/", 70), operator.floordiv: ("//", 70), operator.mod: ("%", 70),
    operator.pow: ("**", 90), operator.lt: ("<", 30), operator.le: ("<=", 30), operator.gt: (">", 30),
    operator.ge: (">=", 30), operator.eq: ("==", 30), operator.ne: ("!=", 30), operator.is_: ("is", 30),
    operator.is_not: ("is not", 30),
}  # fmt: skip


class FunctionNames:
    """The names of the objects that code uses. `space`: the objects that are not in `torch`, `F`, `nn` or builtins."""

    def __init__(self, marks: Collection[str] = ()) -> None:
        self.marks = marks  # of adapters (`Site.mark`): random texts, which are written as names
        self.space: dict[str, Any] = {}
        self.used = {"torch", "F", "nn", "self", "super"}  # names that variables can't have
        self._names: dict[int, str] = {}  # by id; `space` keeps the objects

    def name_of(self, value: Any) -> str:
        """The name of a function, class or other object. Different objects get different names."""
        name = _torch_names().get(id(value)) or self._names.get(id(value))
        if name is None:
            name = self._names[id(value)] = self._add_name(value)
        self.used.add(name.partition(".")[0])
        return name

    def _add_name(self, value: Any) -> str:
        """Add an object to `space`, in the namespace of its class or module if its short name is not free."""
        name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__name__.lower()
        *outer, last = str(name).rpartition("<locals>.")[2].split(".")
        short = identifier("function" if last == "<lambda>" else last)
        if short not in self.space and short not in _TAKEN:
            self.space[short] = value
            return short
        group_name = identifier(
            outer[-1] if outer else str(getattr(value, "__module__", None) or "other").rpartition(".")[2]
        )
        group = self.space.setdefault(group_name, SimpleNamespace())
        while not isinstance(group, SimpleNamespace) or group_name in _TAKEN:
            group_name += "_"
            group = self.space.setdefault(group_name, SimpleNamespace())
        while hasattr(group, short):
            short += "_"
        setattr(group, short, value)
        return f"{group_name}.{short}"

    def _mark(self, mark: str) -> str:
        names = (f"mark_{number}" if number > 1 else "mark" for number in itertools.count(1))
        name = next(name for name in names if self.space.get(name, mark) == mark)
        self.space[name] = mark
        self.used.add(name)
        return name

    def constant(self, value: Any) -> str:
        """The code of a constant: a value that no node of the graph computes."""
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
            return f"{self.name_of(kind)}.{value.name}"
        return self.name_of(value)


def identifier(text: str) -> str:
    """Turn a text into a valid Python identifier."""
    name = re.sub(r"\W", "_", text)
    return f"_{name}" if not name.isidentifier() or keyword.iskeyword(name) else name


@functools.cache
def _torch_names() -> dict[int, str]:
    """The names of torch's and Python's functions by id. If a function has several names, the first counts."""
    spaces = {
        "": builtins, "F": F, "torch": torch, "torch.linalg": torch.linalg, "torch.fft": torch.fft,
        "torch.special": torch.special, "torch.autograd": torch.autograd, "torch.nn.utils.rnn": nn.utils.rnn,
        "nn": nn, "math": math, "operator": operator,
    }  # fmt: skip
    names: dict[int, str] = {}
    for prefix, space in spaces.items():
        for name in sorted(vars(space)):
            value = getattr(space, name)
            if not name.startswith("_") and callable(value) and _belongs(value, space):
                names.setdefault(id(value), f"{prefix}.{name}".lstrip("."))
    return names


def _belongs(value: Any, space: Any) -> bool:
    """Whether an object belongs to torch or Python, so that the namespace does not merely import it."""
    module = str(getattr(value, "__module__", None) or "torch")
    return module.partition(".")[0] in ("torch", "builtins", "math", "_operator") and not isinstance(value, type(torch))


_TAKEN = frozenset({"torch", "F", "nn", "math", "operator", "self", *dir(builtins), *keyword.kwlist})
