"""`route`: one adapter for each row of a batch. What a site runs meanwhile is its plan (`surgery.routed`).

Sites get a class that asks whether the thread that calls them is routing; then the plan for them runs, else what ran
before. So threads route on one model without seeing each other, and a block leaves nothing behind.
"""

from __future__ import annotations

import copyreg
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from surgery import claims
from surgery.collector import collector_waits
from surgery.errors import SurgeryError
from surgery.here import here
from surgery.install import recipe_of, swap
from surgery.joint_rewrite import routes_itself
from surgery.journal import Journal
from surgery.layout import prove
from surgery.neutral import neutral
from surgery.outside import Lent, hide_hooks, show_hooks
from surgery.reducers import watch_gradients
from surgery.root import rewritten
from surgery.routed import Plan, plan_of
from surgery.rows import Rows
from surgery.state import ModelState, adapter_names, require_state, site_state
from surgery.switching import check_none_merged, check_settled
from surgery.wrapped import submodule

__all__ = ["route"]


@contextmanager
def route(model: nn.Module, adapters: Sequence[str | None], *, check: bool = True) -> Iterator[None]:
    """Inside the block each row of a batch runs with an adapter of its own: one name a row, None for the bare base.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, route, using
    >>> from rules import LoraRule
    >>> model = nn.Sequential(nn.Linear(8, 8)).eval()
    >>> for name in ("a", "b"):
    ...     _ = apply_rules(model, LoraRule("0", rank=2, init="random"), adapter=name)
    >>> x = torch.randn(3, 8)
    >>> with route(model, ["a", None, "b"]):
    ...     mixed = model(x)
    >>> with using(model, "b"):
    ...     torch.allclose(mixed[2], model(x)[2], atol=1e-6)
    True

    Which adapters are live outside is of no account inside, nor are their weights. In training, gradients go to the
    rows' adapters; call `backward` inside the block where the model recomputes activations (gradient checkpointing).
    In transformers' `generate` a row's beams go with it. Every thread has its own block; while one is open, nobody can
    apply, activate, merge or remove.

    Low-rank branches of all rows run as two batched products; other rules on each adapter's rows by themselves. A
    block keeps, for each site with low-rank branches, at most two copies of its adapters' tensors, and frees them. It
    makes them anew when a tensor was changed, but for changes through `.data`, which torch does not count.

    Raises `SurgeryError` before anything runs for an unknown name, a call of another number of rows, a merged model,
    or a rule that can't be routed. `check=False` does without the proof that a batch's rows come first in a module's
    input, which is made, where shapes alone don't tell, by running a few rows in two orders.
    PEFT: `adapter_names` of a forward.
    """
    model, state = rewritten(model)
    if any(one.model is model for one in here.routings):
        raise SurgeryError("a block of route(model, …) is open in this thread", fix="leave it first")
    with claims.routing(model):
        with collector_waits():
            routing = _Routing(model, state, adapters, check)
        with _installed(routing):
            before = here.routings, here.plans
            try:
                try:
                    here.routings = (*here.routings, routing)
                    here.plans = {**here.plans, **routing.plans} if here.plans else routing.plans
                    yield
                finally:
                    here.routings, here.plans = before
            finally:  # once more, where it was broken off
                here.routings, here.plans = before
                routing.plans.clear()


class _Routing:
    """One block: names of rows, the plans of sites, and what is known of the call that is running."""

    def __init__(self, model: nn.Module, state: ModelState, adapters: Sequence[str | None], check: bool):
        if isinstance(adapters, str) or not adapters:
            raise SurgeryError("route needs a name for each row", why=f"it is given {adapters!r}", fix='["a", None, …]')
        given = [name for name in adapters if name is not None]
        adapter_names(state, given)
        self.model, self.check = model, check
        self.entries = tuple(_entries(model))
        self.rows = Rows(adapters)
        self.names = tuple(name for name in state.adapters if name in given)
        self.alone = len(set(adapters)) == 1
        # Of the call that is running: the model or its encoder, which `generate` calls by itself, rows and arguments.
        self.entry: nn.Module | None = None
        self.batch: int | None = None
        self.given: tuple[tuple, dict[str, Any]] | None = None
        touched = [name for name, one in state.standing.items() if one.live or name in self.names]
        self.modules = list({id(m): m for name in touched for m in state.places[name].modules}.values())
        held = [check_settled(module) for module in self.modules]
        check_none_merged(state)
        _check_routable(state, self.names, self.alone)
        self.plans: dict[int, Plan | None] = {}
        rules = state.rules_at(set(given))
        for module, site in zip(self.modules, held, strict=True):
            needed = any(routes_itself(one.rule) for one in rules.get(id(module), ()))  # and may object
            self.plans[id(module)] = plan_of(self, module, site) if needed else None  # else at the first call

    def plan(self, module: nn.Module) -> Plan:
        site = site_state(module)
        assert site is not None
        found = plan_of(self, module, site)
        self.plans[id(module)] = found
        if here.plans is not None:
            here.plans[id(module)] = found
        return found

    def enter(self, entry: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The model is called, or its encoder."""
        if self.entry is not None and entry is not self.model:
            return
        size = _batch_of(args, kwargs)
        if size is not None and size != self.rows.count and not (size % self.rows.count == 0 and _generating()):
            raise SurgeryError(
                f"{self.rows.count} adapters are named, and the call has {size} rows",
                fix="name one adapter, or None, for each row",
            )
        self.entry, self.batch, self.given = entry, size, (args, kwargs)

    def leave(self, entry: nn.Module) -> None:
        if entry is self.entry:
            self.entry = self.batch = self.given = None

    def size_of(self, module: nn.Module, value: Tensor) -> int:
        """The size of a tensor's first dimension, once it is known that the rows of the batch come first in it."""
        size = value.shape[0] if value.dim() else 0
        batch = self.batch or self.rows.count
        told = size == batch and value.dim() > 2 and size not in value.shape[1:-1]
        if not told and self.check and size and size % self.rows.count == 0:
            prove(self.entry or self.model, self.modules, module, tuple(value.shape), batch, self.given)
        if not size or size % self.rows.count:
            raise SurgeryError(
                f"{self.rows.count} adapters are named, and a module is called with {tuple(value.shape)}",
                where=site_state(module).path,  # type: ignore[union-attr]
                why="the batch's rows do not come first there, or are not all there",
                fix="exclude it from the adapters, or use one adapter for all rows",
            )
        return size


def _check_routable(state: ModelState, names: Sequence[str], alone: bool) -> None:
    """Whether all rules of these adapters can work on rows, and no adapter holds the base's weights."""
    for name, standing in state.standing.items():
        if name not in names and not standing.in_base:
            continue
        for module, rules in state.places[name]:
            for applied in rules:
                why = None
                if applied.changed and not (alone and name in names):
                    why = f"{applied.rule.label} changed the base's weights at its start, and rows without it need them"
                elif name in names and applied.inside:
                    why = "it looks into the forward, which has a graph for each kind of call"
                elif name in names and not alone and not routes_itself(applied.rule):
                    if not applied.rule.routable:
                        why = "it can't work on some rows of a batch alone"
                    elif any(step.kind == "around" for step in _steps(applied)):
                        why = "it puts functions around others, and does not say how for several adapters (`routed`)"
                if why:
                    site = site_state(module)
                    raise SurgeryError(
                        f"{applied.rule.label} [{name}] can't be routed",
                        where=site.path if site is not None else None,
                        why=why,
                        fix="use it for whole batches: activate, using",
                    )


def _steps(applied: Any) -> list[Any]:
    return applied.layer.tape.steps if applied.layer is not None else []


# The call of the model ----------------------------------------------------------------------------------------


def _batch_of(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """How many rows a call of the model has."""
    named = [kwargs[name] for name in _TEXTS if name in kwargs]
    for value in (*args[:1], *named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    return None


def _generating() -> bool:
    """Whether the model is called by transformers' generate, which repeats rows for beams."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__", "").startswith("transformers."):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _entries(model: nn.Module) -> Iterator[nn.Module]:
    """What is called with a batch: the model, and its encoder, where it has one."""
    yield model
    try:
        encoder = model.get_encoder()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return
    if isinstance(encoder, nn.Module) and encoder is not model and any(encoder is inner for inner in model.modules()):
        yield encoder


def _entered(entry: nn.Module, args: tuple, kwargs: Any = None) -> None:
    # In a thread that routes nothing it may be called before torch has noted that it takes keywords.
    for routing in here.routings:
        if any(entry is known for known in routing.entries):
            routing.enter(entry, args, kwargs or {})


def _left(entry: nn.Module, args: Any, output: Any) -> None:
    for routing in here.routings:
        routing.leave(entry)


_TEXTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "decoder_input_ids")


# Classes of sites while a model is routed ---------------------------------------------------------------------


@contextmanager
def _installed(routing: _Routing) -> Iterator[None]:
    """Sites have a class that asks for plans, as long as one block needs it; adapters of the rows may train."""
    model = routing.model
    with _lock, neutral(model), Journal() as journal, collector_waits():
        shared = _models.get(model) or _Shared()
        shared.enter(routing, journal)
    try:
        try:
            yield
        finally:
            shared.leave(routing)
    finally:  # once more, where it was broken off
        shared.leave(routing)


class _Shared:
    """What the blocks on one model share: which there are, what they lend, the hooks."""

    def __init__(self) -> None:
        self.routings: list[_Routing] = []
        self.lent = Lent()
        self.handles: list[Any] = []
        self.switched: list[tuple[nn.Module, str, Any]] = []

    def enter(self, routing: _Routing, journal: Journal) -> None:
        model = routing.model
        state = require_state(model)
        used, trained = self._needed(self.routings)
        journal.undo(_drop, model)
        journal.keep(self.routings, self.handles, self.switched)
        _models[model] = self
        if not self.routings:
            for entry in routing.entries:
                journal.keep(entry.__dict__, entry._forward_pre_hooks, entry._forward_pre_hooks_with_kwargs)
                journal.keep(entry._forward_hooks, entry._forward_hooks_always_called)
                handles = [
                    entry.register_forward_pre_hook(_entered, with_kwargs=True),
                    entry.register_forward_hook(_left, always_call=True),
                ]
                hide_hooks(entry, [handle.id for handle in handles])
                self.handles += handles
            for path, name, _, live in state.switched:
                reader = submodule(model, path)
                self.switched.append((reader, name, getattr(reader, name)))
                journal.attribute(reader, name)
                setattr(reader, name, live)
        self.routings.append(routing)
        for module in routing.modules:
            if id(module) not in used:
                journal.undo(_ask_no_more, module)
                swap(module, _asking(type(module)))
        for name in routing.names:
            if name not in trained and not state.standing[name].live:
                for box in state.places[name].boxes:
                    journal.undo(self.lent.take_back, box)
                    self.lent.lend(box)
                    watch_gradients(name, box.parameters())

    def leave(self, routing: _Routing) -> None:
        """End a block; again, where that was broken off."""
        with _lock, collector_waits():
            if any(one is routing for one in self.routings):
                self._leave(routing)
            _drop(routing.model)

    def _leave(self, routing: _Routing) -> None:
        model = routing.model
        state = require_state(model)
        left = [one for one in self.routings if one is not routing]
        used, trained = self._needed(left)
        for name in routing.names:
            if name not in trained and not state.standing[name].live:
                for box in state.places[name].boxes:
                    self.lent.take_back(box)
        for module in routing.modules:
            if id(module) not in used:
                _ask_no_more(module)
        if not left:
            for entry in routing.entries:
                show_hooks(entry)
            for handle in self.handles:
                handle.remove()
            for reader, name, value in self.switched:
                setattr(reader, name, value)
        self.routings[:] = left

    def _needed(self, routings: Sequence[_Routing]) -> tuple[set[int], set[str]]:
        """The sites that blocks use, by id, and the adapters."""
        return {id(m) for one in routings for m in one.modules}, {name for one in routings for name in one.names}


def _drop(model: nn.Module) -> None:
    shared = _models.get(model)
    if shared is not None and not shared.routings:
        del _models[model]


def _ask_no_more(module: nn.Module) -> None:
    cls = type(module)
    if "_surgery_asks" in vars(cls):
        swap(module, cls.__bases__[0])


def _asking(cls: type[nn.Module]) -> type[nn.Module]:
    """A class like this one, whose forward asks whether its thread is routing."""
    found = _classes.get(cls)
    if found is not None:
        return found
    own: Any = cls.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plans = here.plans
        if plans is None or id(self) not in plans:
            plan = _elsewhere(self)
            return own(self, *args, **kwargs) if plan is None else plan(self, args, kwargs)
        plan = plans[id(self)]
        if plan is None:
            plan = _routing_of(self).plan(self)
        return plan(self, args, kwargs)

    forward.__wrapped__ = own  # type: ignore[attr-defined]  # for its signature
    names = {
        "forward": forward,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_surgery_asks": True,
        "_surgery_base": getattr(cls, "_surgery_base", cls),
        "_surgery_recipe": recipe_of(cls),
        "_surgery_self": property(lambda self: self),
    }
    metaclass: Any = type(cls)
    found = _classes[cls] = metaclass(cls.__name__, (cls,), names)
    return found


def _routing_of(module: nn.Module) -> _Routing:
    return next(routing for routing in here.routings if id(module) in routing.plans)


def _elsewhere(module: nn.Module) -> Plan | None:
    """The plan of another thread, for one that works for it: a backward that computes activations once more."""
    if getattr(module, "_is_replica", False):
        raise SurgeryError("DataParallel's copies can't be routed", fix="DistributedDataParallel")
    if torch._C._current_graph_task_id() == -1 or here.plans is not None:
        return None
    with _lock:
        found = [routing for shared in _models.values() for routing in shared.routings if id(module) in routing.plans]
    if len(found) > 1:
        raise SurgeryError(
            "it can't be told whose rows are computed once more",
            why="several threads route on this model, and its activations are recomputed in a thread of autograd",
            fix="turn gradient checkpointing off, or train in one thread",
        )
    return (found[0].plans[id(module)] or plan_of(found[0], module, site_state(module))) if found else None  # type: ignore[arg-type]


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    """A copy or a pickle is of the model outside of the block."""
    cls = type(self)
    own = cls.__bases__[0]
    made = own.__reduce_ex__(self, protocol)  # type: ignore[arg-type]
    function, args, *rest = made
    if function is copyreg.__newobj__ and args[0] is cls:  # type: ignore[attr-defined]
        recipe = recipe_of(own)
        if recipe is not None:
            from surgery.install import revived

            return (revived, (recipe, *args[1:]), *rest)
        return (_new, (own, *args[1:]), *rest)  # by its name, pickle would want the object's present class
    return made


def _new(cls: type, *args: Any) -> Any:
    return cls.__new__(cls, *args)


_lock = threading.RLock()
_models: WeakKeyDictionary[nn.Module, _Shared] = WeakKeyDictionary()
_classes: WeakValueDictionary[type[nn.Module], type[nn.Module]] = WeakValueDictionary()
