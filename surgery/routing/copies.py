"""Makes copies and pickles inside a `route` block copies of the model without routing.

copy and pickle look up `__reduce_ex__` on the object. The block sets it on modules, to a function that leaves out the
block's hooks and flags.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn

from surgery.state.adapter_tensors import AdapterTensors

__all__ = ["Lent", "hide_hooks", "show_hooks"]

_REDUCE = "__reduce_ex__"


def hide_hooks(model: nn.Module, ids: Iterable[int]) -> None:
    """Exclude these hooks of the model, which belong to the block, from copies and pickles."""
    model.__dict__[_REDUCE] = functools.partial(_without_hooks, model, frozenset(ids))


def show_hooks(model: nn.Module) -> None:
    """Undo `hide_hooks`."""
    model.__dict__.pop(_REDUCE, None)


class Lent:
    """Idle adapters that train while a block is open. In copies and pickles, their `requires_grad` stays False."""

    def __init__(self) -> None:
        self._outside: dict[int, nn.Parameter] = {}

    def lend(self, box: AdapterTensors) -> None:
        for parameter in _trained(box):
            parameter.requires_grad_(True)
            box.__dict__[_REDUCE] = functools.partial(_idle, box, self)

    def take_back(self, box: AdapterTensors) -> None:
        for parameter in _trained(box):
            parameter.requires_grad_(False)
            box.__dict__.pop(_REDUCE, None)
            self._outside.pop(id(parameter), None)

    def outside(self, parameter: nn.Parameter) -> nn.Parameter:
        """A Parameter on the same memory that does not train; the same object each time, since sites may share it."""
        copy = self._outside.get(id(parameter))
        if copy is None or copy.data_ptr() != parameter.data_ptr():
            copy = self._outside[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        return copy


def _trained(box: AdapterTensors) -> list[nn.Parameter]:
    return [tensor for key, tensor in box._parameters.items() if tensor is not None and key not in box.still]


def _reduced(module: nn.Module, protocol: Any) -> tuple[Any, Any, Any, tuple]:
    """The result of the class's `__reduce_ex__`, with a copy of the state."""
    function, args, *rest = type(module).__reduce_ex__(module, protocol)  # type: ignore[arg-type]
    state = dict(rest[0]) if rest and isinstance(rest[0], dict) else module.__dict__.copy()
    state.pop(_REDUCE, None)
    return function, args, state, tuple(rest[1:])


def _without_hooks(model: nn.Module, ids: frozenset[int], protocol: Any) -> tuple:
    function, args, state, rest = _reduced(model, protocol)
    for kind in (name for name in state if name.startswith(("_forward_hooks", "_forward_pre_hooks"))):
        own_hooks = [(key, hook) for key, hook in state[kind].items() if key not in ids]
        state[kind] = type(state[kind])(own_hooks)
    return (function, args, state, *rest)


def _idle(box: nn.Module, lent: Lent, protocol: Any) -> tuple:
    function, args, state, rest = _reduced(box, protocol)
    parameters = state["_parameters"]
    state["_parameters"] = {
        key: lent.outside(parameter) if parameter is not None and parameter.requires_grad else parameter
        for key, parameter in parameters.items()
    }
    return (function, args, state, *rest)
