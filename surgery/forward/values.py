"""The values of a forward as a rule's rewrite sees them: each operation on a `Value` becomes a step of its tape.

A `Value` does not claim to be a tensor. Therefore torch's C code asks it what a call means, as it asks the proxies of
torch.fx.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from surgery.errors import SiteError
from surgery.forward.context_regions import Region
from surgery.forward.tape_steps import Ref
from surgery.forward.unpacking import count_unpacked, unpack
from surgery.transaction.user_frames import line_running

__all__ = ["OPERATORS", "Attribute", "Samples", "SizeValue", "StepWriter", "Value", "Watch", "ref_of", "tape_of"]


class Watch(Protocol):
    """Watches the code of a rewrite while it runs."""

    @property
    def region(self) -> Region | None: ...

    def value_of(self, tensor: torch.Tensor) -> Value | None:
        """Returns a tensor that torch created without a value, as steps of the tape; None if its origin is unknown."""


class Samples(Protocol):
    """The values in an example, for decisions of Python."""

    def decide(self, value: Value, ref: Ref) -> Any:
        """Returns the example's value for a decision of Python; None if it is unknown."""


class StepWriter(Protocol):
    """The tape, as its values use it."""

    where: str
    strict: bool
    watch: Watch | None
    samples: Samples | None

    def call(
        self, kind: str, target: Any, args: Any, kwargs: dict[str, Any], region: Region | None = None
    ) -> Value: ...
    def count_of(self, ref: Ref) -> int | None: ...
    def depends_on_sizes(self, ref: Ref) -> bool: ...


_TO_NUMBER = "turn a value into a Python number"


class Value:
    """A tensor or other value of the site's forward, as a rule sees it: a rule uses it like a tensor.

    Operators, methods, attributes, torch functions and writes in place are recorded. Python can decide on a value that
    comes from shapes of parameters or from an example (`Tape.samples`). Other decisions raise `SiteError`, because a
    value represents every later call.
    """

    __slots__ = ("_ref", "_tape")

    def __init__(self, tape: StepWriter, ref: Ref):
        self._tape, self._ref = tape, ref

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        tape = tape_of((args, kwargs))
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property of torch.Tensor, read through its descriptor
            return Attribute(tape, ref_of(args[0]), func.__self__.__name__)
        if func is torch.is_tensor:
            return True
        if not tape.strict and func in _DROPOUTS and _always_drops(func, args, kwargs or {}):
            raise SiteError(
                f"a rewrite calls {name} as if it were always training",
                where=tape.where,
                why="a rewrite is recorded once, and the recording would fix the flag",
                fix="F.dropout(x, p, site.training), which is read at each call",
            )
        function = OPERATORS.get(name, func) if name.startswith("__") else func
        return tape.call("function", function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or (self._tape.strict and not hasattr(torch.Tensor, name)):
            raise AttributeError(name)
        return Attribute(self._tape, ref_of(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_tape", "_ref", "_name", "_owner"):
            return object.__setattr__(self, name, value)
        fix = f"compute a new value; where it is a ModelOutput, value[{name!r}] = …; or use site.apply(function, …)"
        raise self._refuse(f"set {name} on a value", fix)

    def __repr__(self) -> str:
        return f"<{' '.join(str(part) for part in self._ref[:2] if part != '')} of {self._tape.where or 'the site'}>"

    __hash__ = object.__hash__

    def _refuse(self, action: str, fix: str) -> SiteError:
        return SiteError(
            f"a rewrite can't {action}",
            where=self._tape.where,
            why=f"{self!r} stands for every call to come ({line_running(with_text=True)})",
            fix=fix,
        )

    def _decide(self, kind: type | tuple[type, ...], action: str, fix: str) -> Any:
        """Returns the value in the example, for a decision of Python. Raises `SiteError` if it is unknown."""
        if self._tape.samples is not None:
            value = self._tape.samples.decide(self, ref_of(self))
            if isinstance(value, kind):
                return value
        if self._tape.depends_on_sizes(ref_of(self)):
            fix = f"pass example_inputs, in which sizes are known; or {fix}"
        raise self._refuse(action, fix)

    def __bool__(self) -> bool:
        return bool(
            self._decide(
                (bool, int, float),
                "branch on a value",
                "use torch.where, site.apply(torch.cond, …), site.apply(function, …), or a field of the rule",
            )
        )

    def __iter__(self) -> Any:
        count = count_unpacked(sys._getframe(1))
        if count is None:
            count = self._tape.count_of(ref_of(self))
        if count is None:
            count = self._length(
                "iterate over a value", "unpack it (a, b = value), or take its items by index: value[0]"
            )
        items = self._tape.call("function", unpack, (self, count), {})
        return iter([self._tape.call("function", operator.getitem, (items, index), {}) for index in range(count)])

    def __len__(self) -> int:
        return self._length("take the length of a value", "use value.shape[0], which stays a value")

    def _length(self, action: str, fix: str) -> int:
        return self._tape.call("function", len, (self,), {})._decide(int, action, fix)

    def __index__(self) -> int:
        return self._decide(int, _TO_NUMBER, "pass the value on as it is; torch functions take it")

    def __int__(self) -> int:
        return int(self._decide((int, float), _TO_NUMBER, "pass the value on as it is; torch functions take it"))

    def __float__(self) -> float:
        return float(self._decide((int, float), _TO_NUMBER, "pass the value on as it is; torch functions take it"))

    def __contains__(self, item: object) -> bool:
        return bool(self._tape.call("function", operator.contains, (self, item), {}))

    def __setitem__(self, key: Any, item: Any) -> None:
        self._tape.call("function", operator.setitem, (self, key, item), {})


class SizeValue(Value, torch.SymInt):
    """A size. torch's C code accepts it as a symbolic number; the watch sees the functions that get it."""

    __slots__ = ()
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def node(self) -> Any:
        if self._tape.watch is None:
            raise self._refuse("compute with a value", "use it inside of the rewrite that it belongs to")
        return self


_DROPOUTS = (F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d)


def _always_drops(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a dropout's `training` is the constant True: by default, or from a module created in the rewrite."""
    call = inspect.signature(func).bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments["training"] is True


class Attribute(Value):
    """`value.name`: a method if it is called, else an attribute. It is recorded at its first use."""

    __slots__ = ("_name", "_owner")

    def __init__(self, tape: StepWriter, owner: Ref, name: str):
        super().__init__(tape, Ref("attribute", name))
        self._owner, self._name = owner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Value:
        return self._tape.call("method", self._name, (Value(self._tape, self._owner), *args), kwargs)


def ref_of(value: Value) -> Ref:
    """Returns a value's reference. An attribute gets its step first."""
    if isinstance(value, Attribute) and value._ref.kind == "attribute":
        value._ref = value._tape.call("attribute", value._name, (Value(value._tape, value._owner),), {})._ref
    return value._ref


def tape_of(values: Any) -> StepWriter:
    """Returns the tape of the first value in these arguments; None without a value."""
    if isinstance(values, Value):
        return values._tape
    if isinstance(values, slice):
        values = (values.start, values.stop, values.step)
    items = values.values() if isinstance(values, dict) else values if isinstance(values, (tuple, list)) else ()
    for item in items:
        if (tape := tape_of(item)) is not None:
            return tape
    return None  # type: ignore[return-value]


def _recorder(function: Callable[..., Any], reflected: bool = False) -> Callable[..., Value]:
    def method(self: Value, *operands: Any) -> Value:
        args = (*operands, self) if reflected else (self, *operands)
        return self._tape.call("function", function, args, {})

    return method


OPERATORS: dict[str, Callable[..., Any]] = {}  # methods of torch.Tensor that C code looks up, by name
for _name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split():
    _function = getattr(operator, _name if hasattr(operator, _name) else f"{_name}_")
    setattr(Value, f"__{_name}__", _recorder(_function))
    setattr(Value, f"__r{_name}__", _recorder(_function, reflected=True))
    setattr(Value, f"__i{_name}__", _recorder(getattr(operator, f"i{_name}")))
for _name in "lt le gt ge eq ne neg pos abs invert getitem".split():
    setattr(Value, f"__{_name}__", _recorder(getattr(operator, _name)))
    OPERATORS[f"__{_name}__"] = getattr(operator, _name)
OPERATORS["__setitem__"] = operator.setitem
