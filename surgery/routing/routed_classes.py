"""Classes of sites that check whether the calling thread routes.

The first `route` block on a model swaps them in, and the last block swaps them out.
"""

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
from surgery.routing.copies import Lent, hide_hooks, show_hooks
from surgery.routing.routing_block import RoutingBlock
from surgery.routing.site_plan import RoutedCall, plan_of
from surgery.routing.thread_state import thread_routing
from surgery.state.records import require_state, site_state
from surgery.state.site_links import at_path
from surgery.transaction.garbage_collection import collector_waits
from surgery.transaction.undo_log import Journal
from surgery.weaving.generated_class import recipe_of, swap_class

__all__ = ["RoutedModel", "lock", "routed_models"]


def _on_entry(entry: nn.Module, args: tuple, kwargs: Any = None) -> None:
    # Another thread may call the hook before torch has noted that it takes keywords.
    for routing in thread_routing.routings:
        if any(entry is own_entry for own_entry in routing.entries):
            routing.enter(entry, args, kwargs or {})


def _on_exit(entry: nn.Module, args: Any, output: Any) -> None:
    for routing in thread_routing.routings:
        routing.leave(entry)


class RoutedModel:
    """State that all open blocks on one model share: the blocks, the lent adapters, the hooks and switched modules."""

    def __init__(self) -> None:
        self.routings: list[RoutingBlock] = []
        self.lent = Lent()
        self.handles: list[Any] = []
        self.switched: list[tuple[nn.Module, str, Any]] = []

    def enter(self, routing: RoutingBlock, journal: Journal) -> None:
        """Begin a block: give its new sites checking classes, and let its idle adapters train."""
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
                    entry.register_forward_pre_hook(_on_entry, with_kwargs=True),
                    entry.register_forward_hook(_on_exit, always_call=True),
                ]
                hide_hooks(entry, [handle.id for handle in handles])
                self.handles += handles
            for path, name, _, live in state.switched:
                _, reader = at_path(model, path)
                self.switched.append((reader, name, getattr(reader, name)))
                journal.attribute(reader, name)
                setattr(reader, name, live)
        self.routings.append(routing)
        for module in routing.modules:
            if id(module) not in used:
                journal.undo(_swap_back, module)
                swap_class(module, _checking_class(type(module)))
        for name in routing.names:
            if name not in trained and not state.standing[name].live:
                for box in state.places[name].boxes:
                    journal.undo(self.lent.take_back, box)
                    self.lent.lend(box)
                    watch_gradients(name, box.parameters())

    def leave(self, routing: RoutingBlock) -> None:
        """End a block. A second call finishes an end that an interrupt stopped."""
        with lock, collector_waits():
            if any(other is routing for other in self.routings):
                self._leave(routing)
            _drop(routing.model)

    def _leave(self, routing: RoutingBlock) -> None:
        """Undo `enter` for everything that no remaining block needs."""
        model = routing.model
        state = require_state(model)
        remaining = [other for other in self.routings if other is not routing]
        used, trained = self._needed(remaining)
        for name in routing.names:
            if name not in trained and not state.standing[name].live:
                for box in state.places[name].boxes:
                    self.lent.take_back(box)
        for module in routing.modules:
            if id(module) not in used:
                _swap_back(module)
        if not remaining:
            for entry in routing.entries:
                show_hooks(entry)
            for handle in self.handles:
                handle.remove()
            for reader, name, value in self.switched:
                setattr(reader, name, value)
        self.routings[:] = remaining

    def _needed(self, routings: Sequence[RoutingBlock]) -> tuple[set[int], set[str]]:
        """The ids of the sites that blocks use, and the names of their adapters."""
        sites = {id(module) for routing in routings for module in routing.modules}
        return sites, {name for routing in routings for name in routing.names}


def _drop(model: nn.Module) -> None:
    """Forget the shared state of a model without open blocks."""
    shared = routed_models.get(model)
    if shared is not None and not shared.routings:
        del routed_models[model]


def _swap_back(module: nn.Module) -> None:
    """Give a site the class that it has outside of all blocks."""
    cls = type(module)
    if "_surgery_checks_routing" in vars(cls):
        swap_class(module, cls.__bases__[0])


def _checking_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A class derived from `cls` whose forward checks whether the calling thread routes."""
    checking = _classes.get(cls)
    if checking is not None:
        return checking
    own: Any = cls.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plans = thread_routing.plans
        if plans is None or id(self) not in plans:
            plan = _plan_of_other_thread(self)
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
        "_surgery_checks_routing": True,
        "_surgery_base": getattr(cls, "_surgery_base", cls),
        "_surgery_recipe": recipe_of(cls),
        "_surgery_self": property(lambda self: self),
    }
    metaclass: Any = type(cls)
    checking = _classes[cls] = metaclass(cls.__name__, (cls,), names)
    return checking


def _routing_of(module: nn.Module) -> RoutingBlock:
    return next(routing for routing in thread_routing.routings if id(module) in routing.plans)


def _plan_of_other_thread(module: nn.Module) -> RoutedCall | None:
    """The plan of another thread, for an autograd thread that recomputes activations in its backward pass."""
    if getattr(module, "_is_replica", False):
        raise SurgeryError("DataParallel's copies can't be routed", fix="DistributedDataParallel")
    if torch._C._current_graph_task_id() == -1 or thread_routing.plans is not None:
        return None
    with lock:
        routings = [
            routing for shared in routed_models.values() for routing in shared.routings if id(module) in routing.plans
        ]
    if len(routings) > 1:
        raise SurgeryError(
            "it can't be told whose rows are computed once more",
            why="several threads route on this model, and its activations are recomputed in a thread of autograd",
            fix="turn gradient checkpointing off, or train in one thread",
        )
    if not routings:
        return None
    return routings[0].plans[id(module)] or plan_of(routings[0], module, site_state(module))  # type: ignore[arg-type]


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    """The class's `__reduce_ex__` with the class from outside the block, so copies and pickles do not route."""
    cls = type(self)
    own = cls.__bases__[0]
    reduced = own.__reduce_ex__(self, protocol)  # type: ignore[arg-type]
    function, args, *rest = reduced
    if function is copyreg.__newobj__ and args[0] is cls:  # type: ignore[attr-defined]
        recipe = recipe_of(own)
        if recipe is not None:
            from surgery.weaving.generated_class import revive

            return (revive, (recipe, *args[1:]), *rest)
        return (_new, (own, *args[1:]), *rest)  # pickle would compare `__newobj__` with the object's current class
    return reduced


def _new(cls: type, *args: Any) -> Any:
    return cls.__new__(cls, *args)


lock = threading.RLock()


routed_models: WeakKeyDictionary[nn.Module, RoutedModel] = WeakKeyDictionary()


_classes: WeakValueDictionary[type[nn.Module], type[nn.Module]] = WeakValueDictionary()
