"""Calls a module's own forward, with other parameters on a view of the module.

A view is an instance of the module's own class that shares everything with the module except the replaced tensors
(torch's DataParallel creates replicas in the same way). Python code that reads `self.weight` reads the new value, on
every branch. The module is not changed, so threads, autograd, torch.compile and torch.export see an ordinary call.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.forward.function_registries import with_leaves
from surgery.forward.plain_experts_forward import plain_experts_forward
from surgery.packed.packed_stack import packed_stacks_of
from surgery.packed.packed_weight import PackedWeight, packed_weight_of

__all__ = [
    "base_forward",
    "call_child",
    "call_own",
    "calls_inside",
    "find_tensor",
    "hidden_reference",
    "tensor_at",
    "make_view",
]

# Runs in place of a function from a registry, and gets that function as its first argument.
Around = Callable[..., Any]


def base_forward(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple,
    more: tuple,
    kwargs: dict[str, Any],
    extra: dict[str, Any],
    around: tuple[Around, ...] = (),
) -> Any:
    """Call `Base.forward(module, …)` with `tensors` in place of the parameters and buffers of these names.

    `around`: wrappers of the functions that the forward takes from a registry (`Site.around`).
    """
    base: type[nn.Module] = module._surgery_base  # type: ignore[assignment]
    if "weight" in tensors and (packed := packed_weight_of(module)) is not None:
        return _plain_map(packed, tensors, *args, **kwargs)
    if tensors and tensors.keys() & (stacks := packed_stacks_of(module)).keys():
        return plain_experts_forward(module, stacks, tensors, (*args, *more), {**kwargs, **extra})
    if not around:
        view = make_view(module, base, tensors) if tensors else module
        return base.forward(view, *args, *more, **kwargs, **extra)  # type: ignore[operator, union-attr]
    view = make_view(module, base, tensors)
    view.__dict__["_surgery_around"] = around
    return _with_wrapped_registries(base.forward)(view, *args, *more, **kwargs, **extra)


def call_child(module: nn.Module, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Call a module, with its hooks and adapters, and with `tensors` in place of its own."""
    return make_view(module, type(module), tensors)(*args, **kwargs)


def call_own(module: nn.Module, *args: Any, **tensors: Tensor | None) -> Any:
    """Call a module's own forward, without the edits of rules, with other tensors in place of its own.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import call_own
    >>> layer = nn.Conv2d(3, 8, 3, padding="same")
    >>> call_own(layer, torch.ones(1, 3, 4, 4), weight=torch.ones(2, 3, 3, 3), bias=None).shape
    torch.Size([1, 2, 4, 4])

    The counterpart of `Site.call` for real tensors.

    Args:
        module: The module.
        *args: The arguments of the forward.
        **tensors: Tensors in place of its parameters and buffers, by name; None removes a tensor.
    """
    if "weight" in tensors and (packed := packed_weight_of(module)) is not None:
        return _plain_map(packed, tensors, *args)
    if tensors and tensors.keys() & (stacks := packed_stacks_of(module)).keys():
        return plain_experts_forward(module, stacks, tensors, args, {})
    base = getattr(module, "_surgery_base", type(module))
    return base.forward(make_view(module, base, tensors), *args)


def _plain_map(packed: PackedWeight, tensors: Mapping[str, Tensor | None], x: Tensor) -> Tensor:
    """A quantised module's map with another, plain weight."""
    bias = tensors["bias"] if "bias" in tensors else packed.bias
    weight = tensors["weight"]
    assert weight is not None
    return packed.linear(x, weight, bias)


def forward_around(module: nn.Module, around: Around | tuple[Around, ...], *args: Any, **kwargs: Any) -> Any:
    """Call a module's own forward with a wrapper around each function that it takes from a registry.

    `base_forward` as `show` prints it. `around`: one wrapper, or several.
    """
    return base_forward(module, {}, args, (), kwargs, {}, around if isinstance(around, tuple) else (around,))


def _with_wrapped_registries(forward: Any) -> Any:
    """Returns the forward with its functions from registries wrapped by the `_surgery_around` of their module."""
    wrapped = _forwards.get(forward)
    if wrapped is None:
        wrapped = _forwards[forward] = with_leaves(forward, _call_wrapped)
    return wrapped


def _call_wrapped(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    owner = args[0] if args else None
    if isinstance(owner, nn.Module):
        for around in owner.__dict__.get("_surgery_around", ()):
            function = functools.partial(around, function)
    return function(*args, **kwargs)


def calls_inside(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> list[tuple[Any, tuple, dict[str, Any]]]:
    """Run a module's own forward. Returns its calls of functions from registries: (function, args, kwargs)."""
    base: Any = getattr(module, "_surgery_base", type(module))
    calls: list[tuple[Any, tuple, dict[str, Any]]] = []
    view = make_view(module, base, {})

    def note_call(function: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((function, args, kwargs))
        return function(*args, **kwargs)

    view.__dict__["_surgery_around"] = (note_call,)
    _with_wrapped_registries(base.forward)(view, *args, **kwargs)
    return calls


_forwards: WeakKeyDictionary[types.FunctionType, Any] = WeakKeyDictionary()


def make_view(module: nn.Module, cls: type[nn.Module], tensors: Mapping[str, Tensor | None]) -> nn.Module:
    """Create an instance of `cls` that shares everything with `module` except these tensors.

    Dotted names reach into children.
    """
    view = object.__new__(cls)
    state = dict(module.__dict__)
    own_tensors = {name: tensor for name, tensor in tensors.items() if "." not in name}
    for kind in ("_parameters", "_buffers"):
        state[kind] = {name: own_tensors.get(name, old) for name, old in state[kind].items()}
    # FSDP1 sets the parameters of a call as plain attributes, too, and these hide those in `_parameters`.
    state |= {name: tensor for name, tensor in own_tensors.items() if name in state}
    for name, value in list(state.items()):
        # LSTM, GRU and RNN run on a list of their parameters, which they store beside the named parameters.
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            swapped = {
                id(old): own_tensors[key] for key in own_tensors if (old := find_tensor(module, key)) is not None
            }
            state[name] = [swapped.get(id(item), item) for item in value]
    children = {name.partition(".")[0] for name in tensors if "." in name}
    if children:
        state["_modules"] = dict(state["_modules"])
        for child in children:
            inner = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(child + ".")}
            inner_module = module._modules[child]
            assert inner_module is not None
            state["_modules"][child] = make_view(inner_module, type(inner_module), inner)
    view.__dict__.update(state)
    return view


def find_tensor(module: nn.Module, name: str) -> Tensor | None:
    """Returns a parameter or buffer by dotted name, or None."""
    if name in module._parameters:
        return module._parameters[name]
    *path, last = name.split(".")
    owner: nn.Module | None = module
    for part in path:
        owner = owner._modules.get(part) if owner is not None else None
    if owner is None:
        return None
    parameter = owner._parameters.get(last)
    return parameter if parameter is not None else owner._buffers.get(last)


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """Returns a parameter or buffer by dotted name. Raises `SurgeryError` if it does not exist."""
    tensor = find_tensor(module, name)
    if tensor is None:
        raise SurgeryError(f"{type(module).__name__} has no tensor {name!r}")
    return tensor


def hidden_reference(module: nn.Module, name: str) -> str | None:
    """Returns the attribute that refers to a parameter in a way that a view can't replace, or None."""
    tensor = find_tensor(module, name)
    for attribute, value in module.__dict__.items():
        if attribute.startswith(("_parameters", "_buffers", "_modules")) or isinstance(value, list):
            continue
        items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        if any(item is tensor for item in items):
            return attribute
    return None
