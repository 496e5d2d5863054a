"""The classes of sites while `route` blocks are open: they come with a model's first block, and go with the last."""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from surgery.errors import SurgeryError
from surgery.lifecycle.gradient_reducers import watch_gradients
from surgery.patterns.wrappers import submodule
from surgery.routing.copies import Lent, hide_hooks, show_hooks
from surgery.routing.routing_block import RoutingBlock
from surgery.routing.site_plan import RoutedCall, plan_of
from surgery.routing.thread_state import here
from surgery.state.records import require_state, site_state
from surgery.transaction.garbage_collection import collector_waits
from surgery.transaction.undo_log import Journal
from surgery.weaving.generated_class import recipe_of, swap

__all__ = ["RoutedModel", "lock", "routed_models"]


def _entered(entry: nn.Module, args: tuple, kwargs: Any = None) -> None:
    # In a thread that routes nothing it may be called before torch has noted that it takes keywords.
    for routing in here.routings:
        if any(entry is known for known in routing.entries):
            routing.enter(entry, args, kwargs or {})


def _left(entry: nn.Module, args: Any, output: Any) -> None:
    for routing in here.routings:
        routing.leave(entry)


class RoutedModel:
    """What the blocks on one model share: which there are, what they lend, the hooks."""

    def __init__(self) -> None:
        self.routings: list[RoutingBlock] = []
        self.lent = Lent()
        self.handles: list[Any] = []
        self.switched: list[tuple[nn.Module, str, Any]] = []

    def enter(self, routing: RoutingBlock, journal: Journal) -> None:
        model = routing.model
        state = require_state(model)
        used, trained = self._needed(self.routings)
        journal.undo(_drop, model)
        journal.keep(self.routings, self.handles, self.switched)
        routed_models[model] = self
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

    def leave(self, routing: RoutingBlock) -> None:
        """End a block; again, where that was broken off."""
        with lock, collector_waits():
            if any(one is routing for one in self.routings):
                self._leave(routing)
            _drop(routing.model)

    def _leave(self, routing: RoutingBlock) -> None:
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

    def _needed(self, routings: Sequence[RoutingBlock]) -> tuple[set[int], set[str]]:
        """The sites that blocks use, by id, and the adapters."""
        return {id(m) for one in routings for m in one.modules}, {name for one in routings for name in one.names}


def _drop(model: nn.Module) -> None:
    shared = routed_models.get(model)
    if shared is not None and not shared.routings:
        del routed_models[model]


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


def _routing_of(module: nn.Module) -> RoutingBlock:
    return next(routing for routing in here.routings if id(module) in routing.plans)


def _elsewhere(module: nn.Module) -> RoutedCall | None:
    """The plan of another thread, for one that works for it: a backward that computes activations once more."""
    if getattr(module, "_is_replica", False):
        raise SurgeryError("DataParallel's copies can't be routed", fix="DistributedDataParallel")
    if torch._C._current_graph_task_id() == -1 or here.plans is not None:
        return None
    with lock:
        found = [
            routing for shared in routed_models.values() for routing in shared.routings if id(module) in routing.plans
        ]
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
            from surgery.weaving.generated_class import revived

            return (revived, (recipe, *args[1:]), *rest)
        return (_new, (own, *args[1:]), *rest)  # by its name, pickle would want the object's present class
    return made


def _new(cls: type, *args: Any) -> Any:
    return cls.__new__(cls, *args)


lock = threading.RLock()


routed_models: WeakKeyDictionary[nn.Module, RoutedModel] = WeakKeyDictionary()


_classes: WeakValueDictionary[type[nn.Module], type[nn.Module]] = WeakValueDictionary()
