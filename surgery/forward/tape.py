"""The tape of a rewrite: the primitive edits a rule makes at one site, recorded as data.

A rule's `rewrite` runs on `Value`s. What it does with them is written down here, one step an operation, and only
then woven into the graph of the site's forward (`surgery.weaving.weave`). So an edit has a name and a hash: sites whose
tapes are equal share one generated class, any edit can be left out again without undoing the others, and a rule
can neither mis-wire the graph nor touch the model while it is being planned.

A `Value` claims to be no tensor, so that torch's C code asks it what a call means, as it asks the proxies of torch.fx.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from surgery.errors import SiteError
from surgery.forward.context_regions import Region
from surgery.forward.side_effects import has_effect, is_foreign, writes
from surgery.forward.tape_steps import NOTHING, OPS, Ref, Step, is_whole_number, refs_for_values, refs_in, shift_steps
from surgery.forward.unpacking import unpacked, unpacked_by
from surgery.transaction.user_frames import line_running

__all__ = ["Layer", "OPERATORS", "Samples", "Tape", "Value", "Watched", "for_both_modes", "ref_of", "tape_of"]


class Watched(Protocol):
    """What is known of the code that makes a tape while it runs."""

    @property
    def region(self) -> Region | None: ...

    def made(self, tensor: torch.Tensor) -> Value | None:
        """A tensor that torch made without a value's help, as steps of the tape; None where it is unknown how."""


class Samples(Protocol):
    """What values are in an example, as far as Python may decide on it."""

    def decided(self, value: Value, ref: Ref) -> Any: ...


class Tape:
    """The steps of one rewrite, in order. Equal tapes make equal edits, and once finished they are one object."""

    def __init__(self, where: str = "", strict: bool = False):
        self.where = where
        self.strict = strict  # hasattr(value, name) is answered as a tensor would, for code not written for us
        self.steps: list[Step] = []
        self.late = False
        self._shapes: set[int] = set()  # steps that give shapes, and sizes
        self._sizes: set[int] = set()
        self.watched: Watched | None = None  # while it is being recorded
        self.samples: Samples | None = None
        self.written: set[tuple] = set()  # the forwards, by their keys, that these edits could be written into

    def value(self, kind: str, key: str | int, read: str = "") -> Value:
        return Value(self, Ref(kind, key, read))

    def call(self, kind: str, target: Any, args: Any, kwargs: dict[str, Any], region: Region | None = None) -> Value:
        given = self._frozen(args), self._frozen(kwargs) if kwargs else NOTHING
        if region is None and self.watched is not None:
            region = self.watched.region
        step = Step(kind, target, *given, region, self.late)
        self.steps.append(step)
        index = len(self.steps) - 1
        if self._is_shape(step):
            self._shapes.add(index)
        elif self._is_size(step):
            self._sizes.add(index)
            return SizeValue(self, Ref("op", index))
        return Value(self, Ref("op", index))

    def _is_shape(self, step: Step) -> bool:
        """Whether a step gives sizes: `x.shape`, `x.size()`, the names that one is unpacked into."""
        if step.kind in ("attribute", "method"):
            return step.target == "shape" or step.target == "size" and len(step.args[1]) == 1 and not step.kwargs[1]
        source = step.args[1][0] if step.args[1] else None
        sliced = step.target is operator.getitem and not is_whole_number(step.args[1][1])
        named = isinstance(source, Ref) and source.kind == "op" and source.key in self._shapes
        return named and (step.target is unpacked or sliced)

    def _is_size(self, step: Step) -> bool:
        """Whether a step gives a whole number that shapes are made of."""
        if step.kind in ("attribute", "method"):
            return step.target in ("ndim", "dim", "ndimension", "numel", "nelement", "size")
        if step.target is operator.getitem:
            source = step.args[1][0]
            return isinstance(source, Ref) and source.kind == "op" and source.key in self._shapes
        if step.target in _ON_SIZES:
            refs = list(refs_in(step.args))
            plain = all(isinstance(item, Ref) or is_whole_number(item) for item in step.args[1])
            return plain and bool(refs) and all(ref.kind == "op" and ref.key in self._sizes for ref in refs)
        return step.target is len

    def replace(self, old: Value, new: Any, only: tuple[Ref, ...] = ()) -> None:
        self.steps.append(Step("replace", None, (self._own(old)._replace(read=""), self._frozen(new)), only))

    def around(self, function: Callable[..., Any], values: tuple, at: Value | None = None) -> None:
        self.steps.append(Step("around", function, self._frozen(values), self._frozen({"at": at})))

    def count_of(self, ref: Ref) -> int | None:
        """How many items an operation gives, where it says so; None where it does not."""
        step = self.steps[int(ref.key)] if ref.kind == "op" else None
        if step is None or step.kind not in ("function", "method"):
            return None
        name = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", "")
        if name in ("chunk", "tensor_split", "unsafe_chunk"):
            args, kwargs = refs_for_values(step)
            count = args[1:2] or (kwargs.get("chunks", kwargs.get("sections")),)
            return count[0] if type(count[0]) is int else None
        if step.target is unpacked:
            return int(step.args[1][1][1][2])
        return _COUNTS.get(name)

    def finished(self) -> Tape:
        """The one tape that stands for all equal ones: comparing and hashing it then cost nothing."""
        return _finished.setdefault(tuple(self.steps), self)

    def replaced(self) -> list[Ref]:
        """What this rewrite puts something else in the place of."""
        return [step.args[0] for step in self.steps if step.kind == "replace"]

    def named_in(self, value: Any) -> set[str]:
        """The nodes inside the forward that a value is computed from, as far as the tape does it."""
        return {str(ref.key) for ref in self._sources(self._frozen(value)) if ref.kind == "inside"}

    def on_sizes(self, ref: Ref) -> bool:
        """Whether a value is computed from sizes."""
        return any(source.kind == "op" and source.key in self._shapes | self._sizes for source in self._sources(ref))

    def _sources(self, frozen: Any) -> set[Ref]:
        """The values named in what was frozen, and all that they are computed from."""
        waiting, seen = list(refs_in(frozen)), set[Ref]()
        while waiting:
            ref = waiting.pop()
            if ref not in seen and ref.kind == "op":
                step = self.steps[int(ref.key)]
                waiting += [*refs_in(step.args), *refs_in(step.kwargs)]
            seen.add(ref)
        return seen

    @property
    def acts(self) -> bool:
        """Whether it does anything: puts something in the place of a value, or has an effect of its own."""
        return any(step.kind in ("replace", "around") or _acts(step) for step in self.steps)

    @functools.cached_property
    def by_mode(self) -> bool:
        """Whether its steps are others while training."""
        return any(step.training is not None for step in self.steps)

    @functools.cached_property
    def writes(self) -> bool:
        """Whether one of its steps writes in place."""
        calls = [(OPS[step.kind], step) for step in self.steps if step.kind in OPS]
        return any(writes(op, step.target, *refs_for_values(step)) for op, step in calls)

    @functools.cached_property
    def within(self) -> frozenset[Ref]:
        """What it puts something else in the place of inside of the site: all but the output."""
        return frozenset(ref for ref in self.replaced() if ref.kind != "output")

    @functools.cached_property
    def mentions(self) -> frozenset[Ref]:
        """Every value that its steps name."""
        named = (ref for step in self.steps for ref in (*refs_in(step.args), *refs_in(step.kwargs)))
        return frozenset(ref._replace(read="") for ref in named)

    @functools.cached_property
    def on_state(self) -> tuple[Ref, ...]:
        """The parameters and buffers that it puts something in the place of."""
        return tuple(ref for ref in self.replaced() if ref.kind == "state")

    def _own(self, value: Value) -> Ref:
        """What a value of this tape is. Another tape's is a value of another module's call."""
        if value._tape is not self:
            raise SiteError(
                "a rewrite uses a value of another rewrite",
                where=self.where,
                why=f"{value!r} belongs to another module, or to another recording ({line_running(with_text=True)})",
                fix="compute it from this site's values; what sites share is a tensor, by site.param(…, tied=…)",
            )
        return ref_of(value)

    def _frozen(self, value: Any) -> Any:
        kind = type(value)
        if kind is Value or kind is SizeValue or kind is _Attribute:
            return self._own(value)
        if kind in _PLAIN:
            # 1, 1.0 and True are equal and hash alike, and so do 0.0 and -0.0; edits with them are not.
            return ("constant", (kind, repr(value) if kind is float else None, value))
        if isinstance(value, (tuple, list)):
            items = [self._frozen(item) for item in value]
            return ("tuple" if isinstance(value, tuple) else "list", tuple(items))
        if isinstance(value, dict):
            return ("dict", tuple([(key, self._frozen(item)) for key, item in value.items()]))
        if isinstance(value, slice):
            return ("slice", tuple(self._frozen(item) for item in (value.start, value.stop, value.step)))
        if isinstance(value, torch.Tensor):
            if self.watched is not None and (made := self.watched.made(value)) is not None:
                return ref_of(made)
            raise SiteError(
                "a rewrite can't hold a tensor as a constant",
                where=self.where,
                why="it would belong to no module: not saved, not moved with the model",
                fix="give it a name: site.param(name, tensor, trainable=False); a module: site.submodule(name, make)",
            )
        try:
            hash(value)
        except TypeError:
            raise SiteError(
                f"a rewrite can't hold a {kind.__name__} as a constant",
                where=self.where,
                why="it can change, and edits that are equal share their code",
                fix="use plain numbers, or site.apply(function, …)",
            ) from None
        return ("constant", (kind, repr(value) if isinstance(value, float) else None, value))


class Layer(NamedTuple):
    """One rule's edits at a site, under its adapter's name. What they change is multiplied by `weight`."""

    adapter: str
    label: str
    tape: Tape
    weight: float = 1.0


def for_both_modes(evaluation: Tape, training: Tape) -> Tape:
    """One tape with the steps of one mode and, after them, those of the other."""
    both = Tape(evaluation.where)
    both.steps = [step._replace(training=False) for step in evaluation.steps]
    count = len(both.steps)
    for step in training.steps:
        args, kwargs = (shift_steps(part, count) for part in (step.args, step.kwargs))
        both.steps.append(step._replace(args=args, kwargs=kwargs, training=True))
    return both


def _acts(step: Step) -> bool:
    op = OPS.get(step.kind, "")
    return bool(op) and (has_effect(op, step.target, *refs_for_values(step)) or is_foreign(op, step.target))


_PLAIN = frozenset({int, float, bool, str, type(None)})
_finished: weakref.WeakValueDictionary[tuple[Step, ...], Tape] = weakref.WeakValueDictionary()


class Value:
    """A tensor (or other value) of the site's forward, as a rule sees it: used like a tensor, never looked into.

    Operators, methods, attributes and torch functions are recorded, and so is what they do in place. What Python
    decides on it is known where it comes from shapes of parameters or from an example (`Tape.samples`); it is refused
    elsewhere, since a value stands for every call to come.
    """

    __slots__ = ("_ref", "_tape")

    def __init__(self, tape: Tape, ref: Ref):
        self._tape, self._ref = tape, ref

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        tape = tape_of((args, kwargs))
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property of torch.Tensor, asked through its descriptor
            return _Attribute(tape, ref_of(args[0]), func.__self__.__name__)
        if func is torch.is_tensor:
            return True
        if not tape.strict and func in _WHILE_TRAINING and _always(func, args, kwargs or {}):
            raise SiteError(
                f"a rewrite calls {name} as if it were always training",
                where=tape.where,
                why="what a rewrite does is recorded once, and so would be the flag",
                fix="F.dropout(x, p, site.training), which is read at each call",
            )
        function = OPERATORS.get(name, func) if name.startswith("__") else func
        return tape.call("function", function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or (self._tape.strict and not hasattr(torch.Tensor, name)):
            raise AttributeError(name)
        return _Attribute(self._tape, ref_of(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_tape", "_ref", "_name", "_owner"):
            return object.__setattr__(self, name, value)
        fix = f"compute a new value; where it is a ModelOutput, value[{name!r}] = …; or use site.apply(function, …)"
        raise self._refuse(f"set {name} on", fix)

    def __repr__(self) -> str:
        return f"<{' '.join(str(part) for part in self._ref[:2] if part != '')} of {self._tape.where or 'the site'}>"

    __hash__ = object.__hash__

    def _refuse(self, what: str, fix: str) -> SiteError:
        return SiteError(
            f"a rewrite can't {what} a value",
            where=self._tape.where,
            why=f"{self!r} stands for every call to come ({line_running(with_text=True)})",
            fix=fix,
        )

    def _decided(self, kind: Any, what: str, fix: str) -> Any:
        """What Python is told where it decides on this value: what it is in the example, for calls that have that."""
        if self._tape.samples is not None:
            value = self._tape.samples.decided(self, ref_of(self))
            if isinstance(value, kind):
                return value
        if self._tape.on_sizes(ref_of(self)):
            fix = f"pass example_inputs, in which sizes are known; or {fix}"
        raise self._refuse(what, fix)

    def __bool__(self) -> bool:
        return bool(
            self._decided(
                (bool, int, float),
                "branch on",
                "use torch.where, site.apply(torch.cond, …), site.apply(function, …), or a field of the rule",
            )
        )

    def __iter__(self) -> Any:
        count = unpacked_by(sys._getframe(1))
        if count is None:
            count = self._tape.count_of(ref_of(self))
        if count is None:
            count = self._length("iterate over", "unpack it (a, b = value), or take its items by index: value[0]")
        whole = self._tape.call("function", unpacked, (self, count), {})
        return iter([self._tape.call("function", operator.getitem, (whole, index), {}) for index in range(count)])

    def __len__(self) -> int:
        return self._length("take the length of", "use value.shape[0], which stays a value")

    def _length(self, what: str, fix: str) -> int:
        return self._tape.call("function", len, (self,), {})._decided(int, what, fix)

    def __index__(self) -> int:
        return self._decided(int, "use as a Python number", "pass it on as it is; torch functions take it")

    def __int__(self) -> int:
        return int(
            self._decided((int, float), "use as a Python number", "pass it on as it is; torch functions take it")
        )

    def __float__(self) -> float:
        return float(
            self._decided((int, float), "use as a Python number", "pass it on as it is; torch functions take it")
        )

    def __contains__(self, item: object) -> bool:
        return bool(self._tape.call("function", operator.contains, (self, item), {}))

    def __setitem__(self, key: Any, item: Any) -> None:
        self._tape.call("function", operator.setitem, (self, key, item), {})


class SizeValue(Value, torch.SymInt):
    """A size, which torch's C code takes as one of its own symbolic numbers; the watch sees what it is given to."""

    __slots__ = ()
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def node(self) -> Any:
        if self._tape.watched is None:
            raise self._refuse("compute with", "use it inside of the rewrite that it belongs to")
        return self


_WHILE_TRAINING = (F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d)


def _always(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a dropout's flag is the plain True: by its own default, or of a module made on the way."""
    given = inspect.signature(func).bind(*args, **kwargs)
    given.apply_defaults()
    return given.arguments["training"] is True


class _Attribute(Value):
    """`value.name`: an attribute, or a method once it is called. Recorded when it is used."""

    __slots__ = ("_name", "_owner")

    def __init__(self, tape: Tape, owner: Ref, name: str):
        super().__init__(tape, Ref("attribute", name))
        self._owner, self._name = owner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Value:
        return self._tape.call("method", self._name, (Value(self._tape, self._owner), *args), kwargs)


def ref_of(value: Value) -> Ref:
    if isinstance(value, _Attribute) and value._ref.kind == "attribute":
        value._ref = value._tape.call("attribute", value._name, (Value(value._tape, value._owner),), {})._ref
    return value._ref


def tape_of(values: Any) -> Tape:
    """The tape of the first value among these arguments; None where there is none."""
    if isinstance(values, Value):
        return values._tape
    if isinstance(values, slice):
        values = (values.start, values.stop, values.step)
    items = values.values() if isinstance(values, dict) else values if isinstance(values, (tuple, list)) else ()
    for item in items:
        if (found := tape_of(item)) is not None:
            return found
    return None  # type: ignore[return-value]


def _record(function: Callable[..., Any], reflected: bool = False) -> Callable[..., Value]:
    def method(self: Value, *others: Any) -> Value:
        args = (*others, self) if reflected else (self, *others)
        return self._tape.call("function", function, args, {})

    return method


OPERATORS: dict[str, Callable[..., Any]] = {}  # methods of torch.Tensor that C code asks for, by their names
for _name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split():
    _function = getattr(operator, _name if hasattr(operator, _name) else f"{_name}_")
    setattr(Value, f"__{_name}__", _record(_function))
    setattr(Value, f"__r{_name}__", _record(_function, reflected=True))
    setattr(Value, f"__i{_name}__", _record(getattr(operator, f"i{_name}")))
for _name in "lt le gt ge eq ne neg pos abs invert getitem".split():
    setattr(Value, f"__{_name}__", _record(getattr(operator, _name)))
    OPERATORS[f"__{_name}__"] = getattr(operator, _name)
OPERATORS["__setitem__"] = operator.setitem
_COUNTS = {"topk": 2, "sort": 2, "kthvalue": 2, "mode": 2, "aminmax": 2, "var_mean": 2, "std_mean": 2, "frexp": 2,
           "slogdet": 2, "qr": 2, "svd": 3, "cummax": 2, "cummin": 2}  # fmt: skip
_ON_SIZES = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.pos)
