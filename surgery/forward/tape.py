"""The tape of a rewrite: the primitive edits that a rule makes at one site, recorded as data.

A rule's `rewrite` runs on `Value`s. Each operation becomes one step of the tape; `surgery.weaving.weave` puts the
steps into the graph of the site's forward. An edit therefore has a hash: sites with equal tapes share one generated
class. An edit can be left out without undoing the others. A rule can't damage the graph, and planning does not touch
the model.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from surgery.errors import SiteError
from surgery.forward.context_regions import Region
from surgery.forward.side_effects import has_effect, is_foreign, writes
from surgery.forward.tape_steps import NOTHING, OPS, Ref, Step, is_whole_number, refs_for_values, refs_in, shift_steps
from surgery.forward.unpacking import unpack
from surgery.forward.values import Attribute, Samples, SizeValue, Value, Watch, ref_of
from surgery.transaction.user_frames import line_running

__all__ = ["Layer", "Tape", "for_both_modes"]


class Tape:
    """The steps of one rewrite, in order. Equal tapes are equal edits; `intern` makes them one object."""

    def __init__(self, where: str = "", strict: bool = False):
        self.where = where
        self.strict = strict  # hasattr(value, name) answers as for a tensor, for code that does not know values
        self.steps: list[Step] = []
        self.late = False
        self._shapes: set[int] = set()  # the steps whose results are shapes
        self._sizes: set[int] = set()  # the steps whose results are sizes
        self.watch: Watch | None = None  # only during recording
        self.samples: Samples | None = None
        self.accepted_by: set[tuple] = set()  # the keys of the forwards that accepted these edits

    def value(self, kind: str, key: str | int, read: str = "") -> Value:
        return Value(self, Ref(kind, key, read))

    def call(self, kind: str, target: Any, args: Any, kwargs: dict[str, Any], region: Region | None = None) -> Value:
        arguments = self._freeze(args), self._freeze(kwargs) if kwargs else NOTHING
        if region is None and self.watch is not None:
            region = self.watch.region
        step = Step(kind, target, *arguments, region, self.late)
        self.steps.append(step)
        index = len(self.steps) - 1
        if self._is_shape(step):
            self._shapes.add(index)
        elif self._is_size(step):
            self._sizes.add(index)
            return SizeValue(self, Ref("op", index))
        return Value(self, Ref("op", index))

    def _is_shape(self, step: Step) -> bool:
        """Whether a step's result is a shape: `x.shape`, `x.size()`, a slice or the unpacked items of a shape."""
        if step.kind in ("attribute", "method"):
            return step.target == "shape" or step.target == "size" and len(step.args[1]) == 1 and not step.kwargs[1]
        source = step.args[1][0] if step.args[1] else None
        sliced = step.target is operator.getitem and not is_whole_number(step.args[1][1])
        of_shape = isinstance(source, Ref) and source.kind == "op" and source.key in self._shapes
        return of_shape and (step.target is unpack or sliced)

    def _is_size(self, step: Step) -> bool:
        """Whether a step's result is a whole number from which shapes are computed."""
        if step.kind in ("attribute", "method"):
            return step.target in ("ndim", "dim", "ndimension", "numel", "nelement", "size")
        if step.target is operator.getitem:
            source = step.args[1][0]
            return isinstance(source, Ref) and source.kind == "op" and source.key in self._shapes
        if step.target in _ON_SIZES:
            refs = list(refs_in(step.args))
            whole = all(isinstance(item, Ref) or is_whole_number(item) for item in step.args[1])
            return whole and bool(refs) and all(ref.kind == "op" and ref.key in self._sizes for ref in refs)
        return step.target is len

    def replace(self, old: Value, new: Any, only: tuple[Ref, ...] = ()) -> None:
        self.steps.append(Step("replace", None, (self._ref_of(old)._replace(read=""), self._freeze(new)), only))

    def around(self, function: Callable[..., Any], values: tuple, at: Value | None = None) -> None:
        self.steps.append(Step("around", function, self._freeze(values), self._freeze({"at": at})))

    def count_of(self, ref: Ref) -> int | None:
        """Returns the number of items of an operation's result, if the operation determines it; else None."""
        step = self.steps[int(ref.key)] if ref.kind == "op" else None
        if step is None or step.kind not in ("function", "method"):
            return None
        name = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", "")
        if name in ("chunk", "tensor_split", "unsafe_chunk"):
            args, kwargs = refs_for_values(step)
            count = args[1:2] or (kwargs.get("chunks", kwargs.get("sections")),)
            return count[0] if type(count[0]) is int else None
        if step.target is unpack:
            return int(step.args[1][1][1][2])
        return _COUNTS.get(name)

    def intern(self) -> Tape:
        """Returns the shared object for all equal tapes, so that comparing and hashing it cost nothing."""
        return _interned.setdefault(tuple(self.steps), self)

    def replaced_refs(self) -> list[Ref]:
        """Returns the values that this rewrite replaces."""
        return [step.args[0] for step in self.steps if step.kind == "replace"]

    def source_nodes(self, value: Any) -> set[str]:
        """Returns the nodes inside the forward from which steps of the tape compute a value."""
        return {str(ref.key) for ref in self._sources(self._freeze(value)) if ref.kind == "inside"}

    def depends_on_sizes(self, ref: Ref) -> bool:
        """Whether a value is computed from sizes."""
        return any(source.kind == "op" and source.key in self._shapes | self._sizes for source in self._sources(ref))

    def _sources(self, frozen: Any) -> set[Ref]:
        """Returns the values in a frozen argument, and all values from which they are computed."""
        waiting, sources = list(refs_in(frozen)), set[Ref]()
        while waiting:
            ref = waiting.pop()
            if ref not in sources and ref.kind == "op":
                step = self.steps[int(ref.key)]
                waiting += [*refs_in(step.args), *refs_in(step.kwargs)]
            sources.add(ref)
        return sources

    @property
    def acts(self) -> bool:
        """Whether the rewrite does anything: it replaces a value, or one of its steps has a side effect."""
        return any(step.kind in ("replace", "around") or _acts(step) for step in self.steps)

    @functools.cached_property
    def discards_forward(self) -> bool:
        """Whether the module's own forward has no part in the output, so that nothing inside the module runs."""
        replaced = [step for step in self.steps if step.kind == "replace"]
        if not any(step.args[0].kind == "output" for step in replaced):
            return False
        if any(step.kind in ("own", "module", "around") for step in self.steps):
            return False
        read = [step.args[1:] if step.kind == "replace" else step.args for step in self.steps]
        read += [step.kwargs for step in self.steps]
        return not any(ref.kind in ("output", "base", "inside", "made", "this") for ref in refs_in(tuple(read)))

    @functools.cached_property
    def by_mode(self) -> bool:
        """Whether the steps differ between training and evaluation."""
        return any(step.training is not None for step in self.steps)

    @functools.cached_property
    def writes(self) -> bool:
        """Whether a step writes in place."""
        calls = [(OPS[step.kind], step) for step in self.steps if step.kind in OPS]
        return any(writes(op, step.target, *refs_for_values(step)) for op, step in calls)

    @functools.cached_property
    def inner_replacements(self) -> frozenset[Ref]:
        """The values inside the site that the rewrite replaces: all except the output."""
        return frozenset(ref for ref in self.replaced_refs() if ref.kind != "output")

    @functools.cached_property
    def mentions(self) -> frozenset[Ref]:
        """Every value in the arguments of the steps."""
        refs = (ref for step in self.steps for ref in (*refs_in(step.args), *refs_in(step.kwargs)))
        return frozenset(ref._replace(read="") for ref in refs)

    @functools.cached_property
    def state_replacements(self) -> tuple[Ref, ...]:
        """The parameters and buffers that the rewrite replaces."""
        return tuple(ref for ref in self.replaced_refs() if ref.kind == "state")

    def _ref_of(self, value: Value) -> Ref:
        """Returns the reference of a value. Raises `SiteError` for a value of another tape."""
        if value._tape is not self:
            raise SiteError(
                "a rewrite uses a value of another rewrite",
                where=self.where,
                why=f"{value!r} belongs to another module, or to another recording ({line_running(with_text=True)})",
                fix="compute it from this site's values; what sites share is a tensor, by site.param(…, tied=…)",
            )
        return ref_of(value)

    def _freeze(self, value: Any) -> Any:
        """Convert an argument to hashable data. Values become their `Ref`."""
        kind = type(value)
        if kind is Value or kind is SizeValue or kind is Attribute:
            return self._ref_of(value)
        if kind in _PLAIN:
            # 1, 1.0 and True are equal and hash alike, as 0.0 and -0.0 do, but edits with them must not be equal.
            return ("constant", (kind, repr(value) if kind is float else None, value))
        if isinstance(value, (tuple, list)):
            items = [self._freeze(item) for item in value]
            return ("tuple" if isinstance(value, tuple) else "list", tuple(items))
        if isinstance(value, dict):
            return ("dict", tuple([(key, self._freeze(item)) for key, item in value.items()]))
        if isinstance(value, slice):
            return ("slice", tuple(self._freeze(item) for item in (value.start, value.stop, value.step)))
        if isinstance(value, torch.Tensor):
            if self.watch is not None and (recorded := self.watch.value_of(value)) is not None:
                return ref_of(recorded)
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
    """One rule's edits at a site, under its adapter's name. Their change is multiplied by `weight`."""

    adapter: str
    label: str
    tape: Tape
    weight: float = 1.0


def for_both_modes(evaluation: Tape, training: Tape) -> Tape:
    """Returns one tape with the steps of evaluation, and after them the steps of training."""
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
_interned: weakref.WeakValueDictionary[tuple[Step, ...], Tape] = weakref.WeakValueDictionary()
_COUNTS = {"topk": 2, "sort": 2, "kthvalue": 2, "mode": 2, "aminmax": 2, "var_mean": 2, "std_mean": 2, "frexp": 2,
           "slogdet": 2, "qr": 2, "svd": 3, "cummax": 2, "cummin": 2}  # fmt: skip
_ON_SIZES = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.pos)
