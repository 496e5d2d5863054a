"""A copy or a pickle that is made inside of `route` is of the model outside: without what the block put on it.

It is left out by what stands for a module's `__reduce_ex__`, which copy and pickle look up on the object itself.
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
    """These hooks of the model are the block's."""
    model.__dict__[_REDUCE] = functools.partial(_without_hooks, model, frozenset(ids))


def show_hooks(model: nn.Module) -> None:
    model.__dict__.pop(_REDUCE, None)


class Lent:
    """Idle adapters that train for as long as a block is open. Their records say what they are outside."""

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
        """The same numbers in one that does not train; always the same one, as sites may share it."""
        found = self._outside.get(id(parameter))
        if found is None or found.data_ptr() != parameter.data_ptr():
            found = self._outside[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        return found


def _trained(box: AdapterTensors) -> list[nn.Parameter]:
    return [tensor for key, tensor in box._parameters.items() if tensor is not None and key not in box.still]


def _reduced(module: nn.Module, protocol: Any) -> tuple[Any, Any, Any, tuple]:
    """What the module's class says, with a state of its own."""
    function, args, *rest = type(module).__reduce_ex__(module, protocol)  # type: ignore[arg-type]
    state = dict(rest[0]) if rest and isinstance(rest[0], dict) else module.__dict__.copy()
    state.pop(_REDUCE, None)
    return function, args, state, tuple(rest[1:])


def _without_hooks(model: nn.Module, ids: frozenset[int], protocol: Any) -> tuple:
    function, args, state, rest = _reduced(model, protocol)
    for kind in (name for name in state if name.startswith(("_forward_hooks", "_forward_pre_hooks"))):
        left = [(key, hook) for key, hook in state[kind].items() if key not in ids]
        state[kind] = type(state[kind])(left)
    return (function, args, state, *rest)


def _idle(box: nn.Module, lent: Lent, protocol: Any) -> tuple:
    function, args, state, rest = _reduced(box, protocol)
    parameters = state["_parameters"]
    state["_parameters"] = {
        key: lent.outside(parameter) if parameter is not None and parameter.requires_grad else parameter
        for key, parameter in parameters.items()
    }
    return (function, args, state, *rest)
