"""The tape of a rewrite: the primitive edits a rule makes at one site, recorded as data.

A rule's `rewrite` runs on `Value`s. What it does with them is written down here, one step an operation, and only
then woven into the graph of the site's forward (`surgery.weave`). So an edit has a name and a hash: sites whose
tapes are equal share one generated class, any edit can be left out again without undoing the others, and a rule
can neither mis-wire the graph nor touch the model while it is being planned.
"""

from __future__ import annotations

import functools
import inspect
import operator
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from surgery.errors import SiteError

__all__ = ["Tape", "Value"]


class Ref(NamedTuple):
    """A value by what it is: ("input", name), ("output", ""), ("state", path), ("param", name), ("op", step).

    In a forward that is held as a graph also ("inside", node), what an operation's result is at present, and
    ("made", node), what the operation itself gives, before what rules put in its place.
    """

    kind: str
    key: str | int


class Step(NamedTuple):
    """One edit. kind: "function", "method", "attribute", "module" (a child), "own" (the site's own operation once more:
    args its inputs, kwargs its tensors), "around" (what makes a function around those from registries, or around one
    operation), or "replace" (args: what is replaced, by what; kwargs: operations in which alone it is)."""

    kind: str
    target: Any
    args: Any
    kwargs: Any


class Tape:
    """The steps of one rewrite, in order. Equal tapes make equal edits, and once finished they are one object."""

    def __init__(self, where: str = "", strict: bool = False):
        self.where = where
        self.strict = strict  # hasattr(value, name) is answered as a tensor would, for code not written for us
        self.steps: list[Step] = []
        self.written: set[tuple] = set()  # the forwards, by their keys, that these edits could be written into

    def value(self, kind: str, key: str | int) -> Value:
        return Value(self, Ref(kind, key))

    def call(self, kind: str, target: Any, args: Any, kwargs: dict[str, Any]) -> Value:
        self.steps.append(Step(kind, target, self._frozen(args), self._frozen(kwargs) if kwargs else NOTHING))
        return Value(self, Ref("op", len(self.steps) - 1))

    def replace(self, old: Value, new: Any, only: tuple[Ref, ...] = ()) -> None:
        self.steps.append(Step("replace", None, (ref_of(old), self._frozen(new)), only))

    def around(self, function: Callable[..., Any], values: tuple, at: Value | None = None) -> None:
        self.steps.append(Step("around", function, self._frozen(values), self._frozen({"at": at})))

    def finished(self) -> Tape:
        """The one tape that stands for all equal ones: comparing and hashing it then cost nothing."""
        return _finished.setdefault(tuple(self.steps), self)

    def replaced(self) -> list[Ref]:
        """What this rewrite puts something else in the place of."""
        return [step.args[0] for step in self.steps if step.kind == "replace"]

    @functools.cached_property
    def within(self) -> frozenset[Ref]:
        """What it puts something else in the place of inside of the site: all but the output."""
        return frozenset(ref for ref in self.replaced() if ref.kind != "output")

    @functools.cached_property
    def mentions(self) -> frozenset[Ref]:
        """Every value that its steps name."""
        return frozenset(ref for step in self.steps for ref in (*refs_in(step.args), *refs_in(step.kwargs)))

    @functools.cached_property
    def on_state(self) -> tuple[Ref, ...]:
        """The parameters and buffers that it puts something in the place of."""
        return tuple(ref for ref in self.replaced() if ref.kind == "state")

    def _frozen(self, value: Any) -> Any:
        kind = type(value)
        if kind is Value:
            return value._ref
        if kind is _Attribute:
            return ref_of(value)
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
            raise SiteError(
                "a rewrite can't hold a tensor as a constant",
                where=self.where,
                why="it would belong to no module: not saved, not moved with the model",
                fix="give it a name: site.param(name, tensor, trainable=False)",
            )
        return ("constant", (kind, repr(value) if isinstance(value, float) else None, value))


def refs_in(frozen: Any) -> Iterator[Ref]:
    """The values named in what `Tape._frozen` froze."""
    if isinstance(frozen, Ref):
        yield frozen
    elif isinstance(frozen, tuple) and frozen[:1] != ("constant",):
        for item in frozen:
            yield from refs_in(item)


NOTHING = ("dict", ())
_PLAIN = frozenset({int, float, bool, str, type(None)})
_finished: weakref.WeakValueDictionary[tuple[Step, ...], Tape] = weakref.WeakValueDictionary()


def thawed(frozen: Any, resolve: Callable[[Ref], Any]) -> Any:
    """What `Tape._frozen` froze, with each `Ref` replaced by what `resolve` says."""
    if isinstance(frozen, Ref):
        return resolve(frozen)
    kind, content = frozen
    if kind == "constant":
        return content[2]
    if kind == "dict":
        return {key: thawed(item, resolve) for key, item in content}
    items = [thawed(item, resolve) for item in content]
    return slice(*items) if kind == "slice" else tuple(items) if kind == "tuple" else items


class Value:
    """A tensor (or other value) of the site's forward, as a rule sees it: used like a tensor, never looked into.

    Operators, methods, attributes and torch functions are recorded. Python decisions on it are refused, since it
    stands for every call to come.
    """

    __slots__ = ("_ref", "_tape")

    def __init__(self, tape: Tape, ref: Ref):
        self._tape, self._ref = tape, ref

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Value:
        tape = _tape_of((args, kwargs))
        if getattr(func, "__name__", "") == "__get__":  # a property of torch.Tensor, asked through its descriptor
            return _Attribute(tape, ref_of(args[0]), func.__self__.__name__)
        if not tape.strict and func in _WHILE_TRAINING and _always(func, args, kwargs or {}):
            raise SiteError(
                f"a rewrite calls {func.__name__} as if it were always training",
                where=tape.where,
                why="what a rewrite does is recorded once, and so would be the flag",
                fix="F.dropout(x, p, site.training), which is read at each call",
            )
        return tape.call("function", func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or (self._tape.strict and not hasattr(torch.Tensor, name)):
            raise AttributeError(name)
        return _Attribute(self._tape, ref_of(self), name)

    @property
    def __class__(self) -> type:  # isinstance(value, torch.Tensor) is answered as the tensor would
        return torch.Tensor

    def __repr__(self) -> str:
        return f"<{' '.join(str(part) for part in self._ref if part != '')} of {self._tape.where or 'the site'}>"

    __hash__ = object.__hash__

    def _refuse(self, what: str, fix: str) -> SiteError:
        return SiteError(
            f"a rewrite can't {what} a value",
            where=self._tape.where,
            why=f"{self!r} stands for every call to come",
            fix=fix,
        )

    def __bool__(self) -> bool:
        raise self._refuse("branch on", "use torch.where, or a field of the rule")

    def __iter__(self) -> Any:
        raise self._refuse("iterate over", "take its items by index: value[0]")

    def __len__(self) -> int:
        raise self._refuse("take the length of", "use value.shape[0], which stays a value")

    def __index__(self) -> int:
        raise self._refuse("use as a Python number", "pass it on as it is; torch functions take it")

    __int__ = __float__ = __index__  # type: ignore[assignment]

    def __contains__(self, item: object) -> bool:
        raise self._refuse("search", "use torch functions")

    def __setitem__(self, key: Any, item: Any) -> None:
        raise self._refuse("assign into", "build the new value and return it, or site.replace(old, new)")


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


def _tape_of(values: Any) -> Tape:
    if isinstance(values, Value):
        return values._tape
    items = values.values() if isinstance(values, dict) else values if isinstance(values, (tuple, list)) else ()
    for item in items:
        if (found := _tape_of(item)) is not None:
            return found
    return None  # type: ignore[return-value]  # only on the way: torch calls us with at least one Value


def _record(function: Callable[..., Any], reflected: bool = False) -> Callable[..., Value]:
    def method(self: Value, *others: Any) -> Value:
        args = (*others, self) if reflected else (self, *others)
        return self._tape.call("function", function, args, {})

    return method


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and_",
    "or_",
    "xor",
    "lshift",
    "rshift",
):
    _function = getattr(operator, _name)
    setattr(Value, f"__{_name.rstrip('_')}__", _record(_function))
    setattr(Value, f"__r{_name.rstrip('_')}__", _record(_function, reflected=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert", "getitem"):
    setattr(Value, f"__{_name}__", _record(getattr(operator, _name)))
