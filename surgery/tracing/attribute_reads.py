"""Records the values that a traced forward reads: settings of its modules, and contents of objects such as a KV cache.

The graph checks settings of modules once, at its start, and contents of objects where the forward reads them. A write
to an argument is a node of the graph. A write to the module raises an error.
"""

from __future__ import annotations

import copy
import operator
import types
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from surgery.errors import TraceError
from surgery.forward.parameter_view import make_view
from surgery.tracing.guards import setting_of
from surgery.tracing.provenance import Ledger
from surgery.tracing.proxies import Listener, RecordedList, RecordedObject, is_setting, view_class
from surgery.tracing.tracked_numbers import Number, Real

__all__ = ["Reader"]


class Reader:
    """Creates the objects that the forward sees: views of modules, recorded objects, and values of nodes.

    `listener`: receives the reports of views and recorded objects.
    """

    def __init__(self, ledger: Ledger, listener: Listener):
        self.ledger, self.listener = ledger, listener
        self.views: dict[int, nn.Module] = {}
        self.states: list[tuple[nn.Module, dict[str, Any]]] = []
        self.settings: dict[tuple[Any, ...], Any] = {}  # path → a value of the module that is not a tensor
        self.lists: dict[tuple[Any, ...], tuple[list, list]] = {}  # path → the copy for the forward, and its items

    # Modules ------------------------------------------------------------------------------------------------

    def view_of(self, module: nn.Module) -> nn.Module:
        state = object.__getattribute__(module, "__dict__")
        if "_surgery_recorder" in state:
            return module
        view = self.views.get(id(module))
        if view is None:
            # The code of a compiled module is invisible; calling it raises an error.
            source = nn.Module() if isinstance(module, torch.jit.ScriptModule) else module
            base = getattr(source, "_surgery_base", type(source))
            view = self.views[id(module)] = make_view(source, view_class(base), {})
            view_state: dict[str, Any] = object.__getattribute__(view, "__dict__")
            view_state["_surgery_real"], view_state["_surgery_recorder"] = module, self.listener
            view_state["_modules"] = {
                name: child and self.view_of(child)
                for name, child in source._modules.items()
                if name != "adapters" or base is type(source)
            }
            self.states.append((view, dict(view_state)))
        return view

    def check_unchanged(self) -> None:
        """Raise `TraceError` if the forward changed the state of a module."""
        for view, before in self.states:
            now = object.__getattribute__(view, "__dict__")
            if now.keys() != before.keys() or any(now[key] is not before[key] for key in before):
                raise TraceError(f"the forward changes the state of {self.ledger.path_of(view) or 'the module'}")
        for path, (now, before) in self.lists.items():
            if [*map(id, now)] != [*map(id, before)]:
                self.refuse_change(path)
        if changed := self.restore_settings():
            self.refuse_change(changed)

    def restore_settings(self) -> tuple[Any, ...] | None:
        """Restore lists and dicts of plain values to their state at the first read. Returns a changed path, or None."""
        changed = None
        for path, before in self.settings.items():
            if isinstance(before, _MUTABLE) and (now := setting_of(self.ledger.module, path)) != before:
                changed = path
                now.clear()
                now.extend(before) if isinstance(now, list) else now.update(before)
        return changed

    def refuse_change(self, path: tuple[Any, ...]) -> NoReturn:
        raise TraceError(
            f"the forward changes {'.'.join(map(str, path))} of the module",
            why="a graph holds what is computed, not what is remembered between calls",
        )

    def read_attribute(self, owner: nn.Module, name: str, value: Any) -> Any:
        """Returns an attribute of a module as the forward sees it, and records the read."""
        path = self.ledger.path_of(owner)
        where = (*path.split("."), name) if path else (name,)
        target = ".".join(where)
        if is_setting(value):
            self.settings.setdefault(where, copy.copy(value))
            return value
        if isinstance(value, int):
            node = self.ledger.graph.get_attr(target)
            self.ledger.values[node] = value
            return Number(self.ledger, value, node)
        if isinstance(value, Tensor):
            if id(value) in self.ledger.entries:
                return value
            return self.ledger.register(value, lambda: self.ledger.graph.get_attr(target))
        if isinstance(value, nn.Module):
            return self.view_of(value)
        if type(value) is tuple:
            return tuple([self.read_list_item(item, target, index) for index, item in enumerate(value)])
        if type(value) is list:
            if where not in self.lists:
                items = [self.read_list_item(item, target, index) for index, item in enumerate(value)]
                self.lists[where] = items, [*items]
            return self.lists[where][0]
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
            return value
        if id(value) not in self.ledger.entries:
            self.ledger.register(value, self.record_object(value, self.ledger.graph.get_attr(target), where))
        return self.ledger.entries[id(value)][1]

    def read_list_item(self, item: Any, target: str, index: int) -> Any:
        """Returns an item of a module's list as the forward sees it."""
        if isinstance(item, nn.Module):
            return self.view_of(item)
        if isinstance(item, Tensor) and id(item) not in self.ledger.tensors and id(item) not in self.ledger.entries:
            return self.ledger.register(item, self.ledger.lazy(lambda: self.ledger.graph.get_attr(target), index))
        return item

    # Objects ------------------------------------------------------------------------------------------------

    def read_item(self, owner: RecordedObject, function: Any, key: Any, value: Any) -> Any:
        """Returns an attribute or item of a recorded object as the forward sees it, and records the read."""
        settled = (*owner._settled, key) if owner._settled is not None and isinstance(key, (str, int)) else None
        if settled is not None and is_setting(value):
            self.settings.setdefault(settled, copy.copy(value))
            return value
        node = self.ledger.graph.call_function(function, (owner._node, self.ledger.node(key)))
        if settled is not None and isinstance(value, int):
            self.ledger.values[node] = value
        if settled is not None and not isinstance(value, (Tensor, int, nn.Module)):
            return self.record_object(value, node, settled)
        return self.wrap_external(value, node)

    def wrap_external(self, value: Any, node: fx.Node) -> Any:
        """Wrap a value from an object of the user. Python may decide on its type, so the graph checks the type."""
        compared = is_setting(value) and not isinstance(value, (bool, str, type(None), *_MUTABLE))
        if compared:
            self.ledger.guard(node, value)
        elif isinstance(value, bool) or not isinstance(value, int):
            self.ledger.guard_parts(value, node)
        return value if compared else self.wrap_part(value, node)

    def wrap_part(self, value: Any, node: Any) -> Any:
        """Wrap a part of an object. Lists and dicts are not copied, so that reads and writes of them are recorded."""
        if isinstance(value, _MUTABLE):
            return self.record_object(value, node)
        if isinstance(value, tuple) and not isinstance(value, torch.Size):
            items = [self.wrap_part(item, self.ledger.lazy(node, index)) for index, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return self.wrap(value, node)

    # Nodes → values -----------------------------------------------------------------------------------------

    def wrap(self, value: Any, node: Any) -> Any:
        """Returns the result of a node as the forward sees it. `node`: the node, or a function that creates it."""
        if isinstance(value, Tensor):
            entry = self.ledger.entries.get(id(value))
            if entry is not None and entry[1] is node:  # written to in place
                return value
            if entry is not None or id(value) in self.ledger.tensors:  # a layer returned its input
                with self.ledger.paused():
                    value = torch.ops.aten.alias.default(value)
            return self.ledger.register(value, node)
        if value is None or isinstance(value, (bool, str, torch.dtype, torch.device)):
            return value
        if isinstance(value, (int, float)):
            tracked: Any = Number if isinstance(value, int) else Real
            return tracked(self.ledger, value, self.ledger.resolve(node))
        if isinstance(value, torch.Size):
            owner, ledger = self.ledger.resolve(node), self.ledger
            nodes = [ledger.shared_node(operator.getitem, (owner, index)) for index in range(len(value))]
            return torch.Size([Number(ledger, size, at) for size, at in zip(value, nodes, strict=True)])  # type: ignore[misc]
        if isinstance(value, tuple) or type(value) is list:
            items = [self.wrap(item, self.ledger.lazy(node, index)) for index, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            wrapped = copy.copy(value)
            for key, item in value.items():
                wrapped[key] = self.wrap(item, self.ledger.lazy(node, key))
            return wrapped
        if isinstance(value, nn.Module):
            return self.view_of(value)
        return value if is_setting(value) else self.record_object(value, node)

    def record_object(self, value: Any, node: Any, settled: tuple[Any, ...] | None = None) -> Any:
        """Returns a proxy of an object, whose state is that of the real object."""
        kind = RecordedList if isinstance(value, list) else RecordedObject
        return kind(self.listener, self.ledger.resolve(node), value, settled)


_MUTABLE = (list, dict, set)
