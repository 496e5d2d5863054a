"""Reasons why the class of a module can't be changed."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from surgery.errors import qualified_name
from surgery.sharded_tensors import sharding_of
from surgery.state.records import site_state
from surgery.transaction.gradient_flags import lazy_in

__all__ = ["binds_forward", "reason_against"]


def reason_against(module: nn.Module, adds_tensors: bool | None = None) -> tuple[str, str] | None:
    """Returns why a new class of a module is impossible or would have no effect (why, what to do), or None.

    `adds_tensors`: whether the module would get an adapter's tensors. Default None: unless it is a site already.
    """
    adds_tensors = site_state(module) is None if adds_tensors is None else adds_tensors
    cls = type(module)
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
        names = ", ".join(lazy_in(module))
        return f"its {names} has no shape before its first call", "run one batch through the model first: model(batch)"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module, compiled already", "apply rules before torch.jit"
    if "parametrizations" in module._modules:
        names = ", ".join(module._modules["parametrizations"]._modules)  # type: ignore[union-attr]
        return (
            f"its {names} is parametrized",
            "torch.nn.utils.parametrize.remove_parametrizations first, add it again after",
        )
    forward = module.__dict__.get("forward")
    if forward is not None and not binds_forward(forward, module, cls):
        scheme = calls_class_forward(forward, module)
        if scheme is not None and getattr(scheme, "input_activations", None) is not None:
            return (
                "compressed-tensors rounds its input in a forward that was set on the instance",
                "load the model as plain weights: CompressedTensorsConfig(dequantize=True)",
            )
        if scheme is None and not binds_forward(module.__dict__.get("_old_forward"), module, cls):
            return (
                f"a forward was set on the instance ({getattr(forward, '__qualname__', forward)!s})",
                "apply rules before whatever replaces forward (kernels, hooks)",
            )
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or isinstance(module, nn.Sequential) and adds_tensors:
        return f"a {cls.__name__} iterates over its children, adapters included", "target its children, or its parent"
    if cls.forward is nn.Module.forward:
        fix = "target the modules inside it; with_layers(model) makes layers of a graph of torch.export"
        if isinstance(module, (nn.ParameterDict, nn.ParameterList)):
            fix = "exclude it: no rule reaches parameters that a container hands out"
        return "it only holds what is in it, and is never called", fix
    state = site_state(module)
    if state is not None and cls is not state.base and "_surgery_recipe" not in vars(cls):
        return f"another class was put on top of it: {qualified_name(cls)}", "undo that first"
    if state is None and "_surgery_recipe" in vars(cls):
        return "it is a rewritten module whose record is lost", "copy modules with copy.deepcopy"
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):  # weight_norm, spectral_norm, pruning
            return (
                f"a {type(hook).__name__} hook recomputes its weight before each call",
                "take it off first: torch.nn.utils.remove_weight_norm, remove_spectral_norm, or prune.remove",
            )
    return sharding_of(module)


def binds_forward(bound: Any, module: nn.Module, cls: type) -> bool:
    """Whether a value is the forward of this class, bound to this module."""
    return isinstance(bound, types.MethodType) and bound.__self__ is module and bound.__func__ is cls.forward


def calls_class_forward(forward: Any, module: nn.Module) -> Any:
    """The scheme of compressed-tensors, if a forward set on the instance is its wrapper; else None.

    The wrapper calls the forward of the module's class, so a new class has its effect.
    """
    function = getattr(forward, "__func__", None)
    package = str(getattr(function, "__globals__", {}).get("__name__", "")).partition(".")[0]
    own = isinstance(forward, types.MethodType) and forward.__self__ is module
    return module.__dict__.get("quantization_scheme") if own and package == "compressed_tensors" else None
