"""Runs the experts of a quantised module as the experts of its architecture, by plain arithmetic on their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.packed.dequantised_stack import DequantisedStack
from surgery.packed.packed_stack import PackedStack, plain_experts

__all__ = ["plain_experts_forward"]


class _Eager:
    """A configuration that says to pick single experts, which is one of transformers' implementations."""

    _experts_implementation = "eager"

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


def plain_experts_forward(
    module: nn.Module, stacks: Mapping[str, PackedStack], tensors: Mapping[str, Any], args: tuple, kwargs: Any
) -> Any:
    """Calls the forward of the unquantised class, with `tensors` in place of stacks and other parameters.

    It computes in the dtype of the activations, as kernels of quantised weights do. Stacks without a replacement are
    dequantised expert by expert.
    """
    inputs = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point())
    dtype = next((value.dtype for value in inputs), torch.get_default_dtype())
    view: Any = plain_experts(module)
    names = [name for name, tensor in view._parameters.items() if tensor is not None and tensor.is_meta]
    values = {name: _value_of(module, stacks, name) for name in names}
    values = {name: value.to(dtype) for name, value in (values | dict(tensors)).items()}
    for name in values:
        view._parameters.pop(name, None)
    parallel = getattr(module, "_is_expert_parallel", False)
    view.__dict__.update(values, training=module.training, _is_expert_parallel=parallel)
    if "config" in view.__dict__:
        view.__dict__["config"] = _Eager(view.__dict__["config"])
    return type(view).forward(view, *args, **kwargs)


def _value_of(module: nn.Module, stacks: Mapping[str, PackedStack], name: str) -> Any:
    return DequantisedStack(stacks[name]) if name in stacks else getattr(module, name)
