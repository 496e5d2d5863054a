"""The base's own forward, called by name; where a rule edits parameters, on a view of the module that holds them.

A view is an instance of the module's own base class that shares everything with it but the tensors that were put
in their place (torch's DataParallel replicas are made the same way). Python code that reads `self.weight` reads the
new value, whatever its branches; nothing is written to the module, so threads, autograd, torch.compile and
torch.export see an ordinary call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["base_forward", "call_own", "hidden_reference", "view"]


def base_forward(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple,
    more: tuple,
    kwargs: dict[str, Any],
    extra: dict[str, Any],
) -> Any:
    """`Base.forward(module, …)` with `tensors` in the place of the parameters and buffers of these names."""
    base: type[nn.Module] = module._surgery_base  # type: ignore[assignment]
    patient = view(module, base, tensors) if tensors else module
    return base.forward(patient, *args, *more, **kwargs, **extra)  # type: ignore[operator, union-attr]


def call_own(module: nn.Module, *args: Any, **tensors: Tensor | None) -> Any:
    """A module's own forward, without any rule's edits, with other tensors in the place of its own.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import call_own
    >>> layer = nn.Conv2d(3, 8, 3, padding="same")
    >>> call_own(layer, torch.ones(1, 3, 4, 4), weight=torch.ones(2, 3, 3, 3), bias=None).shape
    torch.Size([1, 2, 4, 4])

    A tensor given as None is left out. The concrete twin of `Site.call`.
    """
    base = getattr(module, "_surgery_base", type(module))
    return base.forward(view(module, base, tensors), *args)


def view(module: nn.Module, cls: type[nn.Module], tensors: Mapping[str, Tensor | None]) -> nn.Module:
    """An instance of `cls` that shares all of `module` but the given tensors; names may reach into children."""
    shown = object.__new__(cls)
    state = dict(module.__dict__)
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    for kind in ("_parameters", "_buffers"):
        state[kind] = {name: own.get(name, old) for name, old in state[kind].items()}
    for name, value in list(state.items()):
        # LSTM and its kin run on a list of their own parameters, kept beside the named ones.
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            swapped = {id(held): own[key] for key in own if (held := _held(module, key)) is not None}
            state[name] = [swapped.get(id(item), item) for item in value]
    children = {name.partition(".")[0] for name in tensors if "." in name}
    if children:
        state["_modules"] = dict(state["_modules"])
        for child in children:
            inner = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(child + ".")}
            found = module._modules[child]
            assert found is not None
            state["_modules"][child] = view(found, type(found), inner)
    shown.__dict__.update(state)
    return shown


def _held(module: nn.Module, name: str) -> Tensor | None:
    found = module._parameters.get(name)
    return found if found is not None else module._buffers.get(name)


def hidden_reference(module: nn.Module, name: str) -> str | None:
    """The attribute that holds a parameter where a view can't put another in its place, or None."""
    held = _held(module, name)
    for attribute, value in module.__dict__.items():
        if attribute.startswith(("_parameters", "_buffers", "_modules")) or isinstance(value, list):
            continue
        items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        if any(item is held for item in items):
            return attribute
    return None
