"""Tracked numbers: sizes of a traced call that record how they are computed.

Code such as `x.view(b, n // 2, -1)` computes on sizes. In a traced forward (`surgery.tracing.trace`), sizes have the
two types of this module, which torch accepts as its own symbolic numbers. Arithmetic returns another tracked number.
A decision (`if n > 1`, `range(n)`, `int(n / 2)`) returns the plain result of this call and adds a guard to the graph,
so the graph rejects calls with another decision.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Number", "Real", "TrackedNumber", "untracked"]


class TrackedNumber:
    """The base of both types. `value`: the value in this call. `node`: its node, or how to compute it."""

    ledger: Any
    value: Any
    node: Any

    def _compute(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns the result of a function as a tracked number."""
        value = function(*(untracked(arg) for arg in args))
        return self.ledger.number(value, function, args)

    def _decide(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns the plain result of a decision, and adds a guard."""
        value = function(*(untracked(arg) for arg in args))
        self.ledger.guard_number(function, args, value)
        return value

    def _fixed(self) -> Any:
        """Returns the plain value. The graph is then valid only for this value."""
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
        return self._decide(operator.truth, self)

    def __int__(self) -> int:
        return int(self._fixed())

    def __float__(self) -> float:
        return float(self._fixed())

    def __round__(self, digits: Any = None) -> Any:
        return self._compute(round, self) if digits is None else self._compute(round, self, digits)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other  # type: ignore[operator]

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self  # type: ignore[operator]


class Number(TrackedNumber, torch.SymInt):
    """A whole number."""

    def __init__(self, ledger: Any, value: int, node: Any):
        self.ledger, self.value, self.node = ledger, value, node

    @property
    def __class__(self) -> type:  # makes isinstance(size, int) true, as for a plain size
        return int

    def __index__(self) -> int:
        return self._fixed()

    def is_integer(self) -> bool:
        return True

    def bit_length(self) -> int:
        return self._fixed().bit_length()


class Real(TrackedNumber, torch.SymFloat):
    """A floating-point number computed from sizes."""

    def __init__(self, ledger: Any, value: float, node: Any):
        self.ledger, self.value, self.node = ledger, value, node

    @property
    def __class__(self) -> type:
        return float

    def is_integer(self) -> bool:
        return self._fixed().is_integer()


def untracked(value: Any) -> Any:
    """Returns the plain value of a tracked number, without a guard. Other values stay."""
    return value.value if type(value) in (Number, Real) else value


_NUMBERS = (int, float, Number, Real)


def _binary(function: Callable[..., Any], reflected: bool, decides: bool = False) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        if type(other) not in (bool, *_NUMBERS):
            return NotImplemented
        pair = (other, self) if reflected else (self, other)
        return self._decide(function, *pair) if decides else self._compute(function, *pair)

    return method


def _unary(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self: self._compute(function, self)


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
    _kind.__hash__ = TrackedNumber.__hash__  # type: ignore[method-assign]  # setting __eq__ after class creation does not reset it
    for _name in "repr str format bool int float round divmod rdivmod deepcopy copy array".split():
        setattr(_kind, f"__{_name}__", getattr(TrackedNumber, f"__{_name}__"))
