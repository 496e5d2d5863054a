"""Sizes and other numbers of one call, tracked: Python computes with them, a graph sees where they came from.

Code such as `x.view(b, n // 2, -1)` computes on sizes. While a forward is traced by values (`surgery.tracing.trace`)
its sizes are of these two types, which torch takes for its own symbolic numbers. Arithmetic gives another tracked
number and a node; a decision (`if n > 1`, `range(n)`, `int(n / 2)`) gives the plain answer of this call and a guard, so
that a graph is never used for a call that would have decided otherwise.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Number", "Real", "Tracked", "plain"]


class Tracked:
    """What both kinds of number share: the value of this call, the node it stands for, and the ledger."""

    ledger: Any
    value: Any
    node: Any

    def _made(self, function: Callable[..., Any], *args: Any) -> Any:
        value = function(*(plain(arg) for arg in args))
        return self.ledger.number(value, function, args)

    def _decided(self, function: Callable[..., Any], *args: Any) -> Any:
        value = function(*(plain(arg) for arg in args))
        self.ledger.guard_number(function, args, value)
        return value

    def _fixed(self) -> Any:
        """The plain value, for Python code that needs one: the graph then holds for this value alone."""
        self.ledger.guard_number(None, (self,), self.value)
        return self.value

    def __repr__(self) -> str:
        return repr(self._fixed())

    def __str__(self) -> str:
        return str(self._fixed())

    def __format__(self, spec: str) -> str:
        return format(self._fixed(), spec)

    def __hash__(self) -> int:
        return hash(self._fixed())

    def __deepcopy__(self, memo: dict) -> Any:
        return self._fixed()

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        import numpy

        return numpy.asarray(self._fixed(), dtype)

    def __copy__(self) -> Any:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self.value), (self._fixed(),)

    def __bool__(self) -> bool:
        return self._decided(operator.truth, self)

    def __int__(self) -> int:
        return int(self._fixed())

    def __float__(self) -> float:
        return float(self._fixed())

    def __round__(self, digits: Any = None) -> Any:
        return self._made(round, self) if digits is None else self._made(round, self, digits)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other  # type: ignore[operator]

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self  # type: ignore[operator]


class Number(Tracked, torch.SymInt):
    """A whole number."""

    def __init__(self, ledger: Any, value: int, node: Any):
        self.ledger, self.value, self.node = ledger, value, node

    @property
    def __class__(self) -> type:  # isinstance(size, int) is answered as for a plain size
        return int

    def __index__(self) -> int:
        return self._fixed()

    def is_integer(self) -> bool:
        return True

    def bit_length(self) -> int:
        return self._fixed().bit_length()


class Real(Tracked, torch.SymFloat):
    """A floating-point number computed from sizes."""

    def __init__(self, ledger: Any, value: float, node: Any):
        self.ledger, self.value, self.node = ledger, value, node

    @property
    def __class__(self) -> type:
        return float

    def is_integer(self) -> bool:
        return self._fixed().is_integer()


def plain(value: Any) -> Any:
    """The number of this call, without a guard."""
    return value.value if type(value) in (Number, Real) else value


_NUMBERS = (int, float, Number, Real)


def _binary(function: Callable[..., Any], reflected: bool, decides: bool = False) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        if type(other) not in (bool, *_NUMBERS):
            return NotImplemented
        pair = (other, self) if reflected else (self, other)
        return self._decided(function, *pair) if decides else self._made(function, *pair)

    return method


def _unary(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self: self._made(function, self)


for _kind in (Number, Real):
    for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift"):
        _function = getattr(operator, _name)
        setattr(_kind, f"__{_name.rstrip('_')}__", _binary(_function, reflected=False))
        setattr(_kind, f"__r{_name.rstrip('_')}__", _binary(_function, reflected=True))
    for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(_kind, f"__{_name}__", _binary(getattr(operator, _name), reflected=False, decides=True))
    for _name, _function in {
        "neg": operator.neg,
        "pos": operator.pos,
        "abs": operator.abs,
        "ceil": math.ceil,
        "floor": math.floor,
        "trunc": math.trunc,
    }.items():
        setattr(_kind, f"__{_name}__", _unary(_function))
    _kind.__hash__ = Tracked.__hash__  # type: ignore[method-assign]  # __eq__ was set after the class was made
    for _name in "repr str format bool int float round divmod rdivmod deepcopy copy array".split():
        setattr(_kind, f"__{_name}__", getattr(Tracked, f"__{_name}__"))
