"""What a forward reads while it is traced by values: settings of its modules, and what objects hold and give.

What it decides on is checked later: settings of modules once, at the beginning of the graph; what an object such as a
KV cache holds where it is read. What it writes to objects that it was given is a node; to the module, a refusal.
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
from surgery.tracing.proxies import Listener, Recorded, RecordedList, is_setting, viewing
from surgery.tracing.tracked_numbers import Number, Real

__all__ = ["Reader"]


class Reader:
    """What the forward gets to see: views of modules, recorded objects, and values of nodes. `listener`: what views and
    recorded objects report to."""

    def __init__(self, ledger: Ledger, listener: Listener):
        self.ledger, self.listener = ledger, listener
        self.views: dict[int, nn.Module] = {}
        self.states: list[tuple[nn.Module, dict[str, Any]]] = []
        self.settings: dict[tuple[Any, ...], Any] = {}  # what was read from the module and is no tensor
        self.lists: dict[tuple[Any, ...], tuple[list, list]] = {}  # lists that the forward got copies of

    # Modules ------------------------------------------------------------------------------------------------

    def view_of(self, module: nn.Module) -> nn.Module:
        state = object.__getattribute__(module, "__dict__")
        if "_surgery_recorder" in state:
            return module
        found = self.views.get(id(module))
        if found is None:
            # Nothing can be seen in a compiled module; a forward that calls it is refused.
            shown = nn.Module() if isinstance(module, torch.jit.ScriptModule) else module
            base = getattr(shown, "_surgery_base", type(shown))
            found = self.views[id(module)] = make_view(shown, viewing(base), {})
            held: dict[str, Any] = object.__getattribute__(found, "__dict__")
            held["_surgery_real"], held["_surgery_recorder"] = module, self.listener
            held["_modules"] = {
                name: child and self.view_of(child)
                for name, child in shown._modules.items()
                if name != "adapters" or base is type(shown)
            }
            self.states.append((found, dict(held)))
        return found

    def check_unchanged(self) -> None:
        for found, before in self.states:
            now = object.__getattribute__(found, "__dict__")
            if now.keys() != before.keys() or any(now[key] is not before[key] for key in before):
                raise TraceError(f"the forward changes the state of {self.ledger.path_of(found) or 'the module'}")
        for path, (now, before) in self.lists.items():
            if [*map(id, now)] != [*map(id, before)]:
                self.refuse_change(path)
        if changed := self.put_back():
            self.refuse_change(changed)

    def put_back(self) -> tuple[Any, ...] | None:
        """Lists and dicts of plain values become what they were when they were read; one that was not so."""
        changed = None
        for path, before in self.settings.items():
            if isinstance(before, _CHANGEABLE) and (now := setting_of(self.ledger.module, path)) != before:
                changed = path
                now.clear()
                now.extend(before) if isinstance(now, list) else now.update(before)
        return changed

    def refuse_change(self, path: tuple[Any, ...]) -> NoReturn:
        raise TraceError(
            f"the forward changes {'.'.join(map(str, path))} of the module",
            why="a graph holds what is computed, not what is remembered between calls",
        )

    def attribute(self, owner: nn.Module, name: str, value: Any) -> Any:
        """A setting of a module, as the forward reads it."""
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
            if id(value) in self.ledger.known:
                return value
            return self.ledger.register(value, lambda: self.ledger.graph.get_attr(target))
        if isinstance(value, nn.Module):
            return self.view_of(value)
        if type(value) is tuple:
            return tuple([self.listed(item, target, index) for index, item in enumerate(value)])
        if type(value) is list:
            if where not in self.lists:
                items = [self.listed(item, target, index) for index, item in enumerate(value)]
                self.lists[where] = items, [*items]
            return self.lists[where][0]
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
            return value
        if id(value) not in self.ledger.known:
            self.ledger.register(value, self.recorded(value, self.ledger.graph.get_attr(target), where))
        return self.ledger.known[id(value)][1]

    def listed(self, item: Any, target: str, index: int) -> Any:
        if isinstance(item, nn.Module):
            return self.view_of(item)
        if isinstance(item, Tensor) and id(item) not in self.ledger.tensors and id(item) not in self.ledger.known:
            return self.ledger.register(item, self.ledger.lazy(lambda: self.ledger.graph.get_attr(target), index))
        return item

    # Objects ------------------------------------------------------------------------------------------------

    def item(self, owner: Recorded, function: Any, key: Any, value: Any) -> Any:
        """What a recorded object holds under a name or key."""
        settled = (*owner._settled, key) if owner._settled is not None and isinstance(key, (str, int)) else None
        if settled is not None and is_setting(value):
            self.settings.setdefault(settled, copy.copy(value))
            return value
        node = self.ledger.graph.call_function(function, (owner._node, self.ledger.node(key)))
        if settled is not None and isinstance(value, int):
            self.ledger.values[node] = value
        if settled is not None and not isinstance(value, (Tensor, int, nn.Module)):
            return self.recorded(value, node, settled)
        return self.foreign(value, node)

    def foreign(self, value: Any, node: fx.Node) -> Any:
        """What an object of the user's holds or gives. Python may decide on what it is, so that is checked."""
        compared = is_setting(value) and not isinstance(value, (bool, str, type(None), *_CHANGEABLE))
        if compared:
            self.ledger.guard(node, value)
        elif isinstance(value, bool) or not isinstance(value, int):
            self.ledger.guard_parts(value, node)
        return value if compared else self.part(value, node)

    def part(self, value: Any, node: Any) -> Any:
        """Lists and dicts stay those of the object: what is written to them and read from them is recorded."""
        if isinstance(value, _CHANGEABLE):
            return self.recorded(value, node)
        if isinstance(value, tuple) and not isinstance(value, torch.Size):
            items = [self.part(item, self.ledger.lazy(node, index)) for index, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return self.wrap(value, node)

    # Nodes → values -----------------------------------------------------------------------------------------

    def wrap(self, value: Any, node: Any) -> Any:
        """What a node gave (or what `node()` would make a node for), as the forward goes on with it."""
        if isinstance(value, Tensor):
            known = self.ledger.known.get(id(value))
            if known is not None and known[1] is node:  # written to in place
                return value
            if known is not None or id(value) in self.ledger.tensors:  # a layer that gave its input back
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
            nodes = [ledger.one_node(operator.getitem, (owner, index)) for index in range(len(value))]
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
        return value if is_setting(value) else self.recorded(value, node)

    def recorded(self, value: Any, node: Any, settled: tuple[Any, ...] | None = None) -> Any:
        """An object as the forward sees it, whose own state is that of the real one."""
        kind = RecordedList if isinstance(value, list) else Recorded
        return kind(self.listener, self.ledger.resolve(node), value, settled)


_CHANGEABLE = (list, dict, set)
