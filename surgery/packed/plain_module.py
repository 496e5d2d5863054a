"""The plain module that computes what a quantised module computes: a Linear, or the experts of an architecture."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.packed.packed_stack import packed_stacks_of, plain_experts
from surgery.packed.packed_weight import PackedWeight, packed_weight_of
from surgery.packed.quantised_class import AbstractLayout, inherits_from_abc, plain_class

__all__ = ["DequantisedLinear", "plain_module"]


class DequantisedLinear(nn.Linear):
    """A Linear that computes in the dtype of its input, as kernels of quantised weights do."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype))


class AbstractDequantisedLinear(AbstractLayout, DequantisedLinear):
    """The same for modules whose class inherits from `abc.ABC`."""


def plain_module(module: nn.Module, dtype: torch.dtype, *, in_any_dtype: bool = False) -> nn.Module:
    """A new module with the dequantised numbers of a quantised one, and copies of its biases, in a dtype.

    `in_any_dtype`: a Linear computes in the dtype of its input.
    """
    packed = packed_weight_of(module)
    if packed is not None:
        return _linear(module, packed, dtype, in_any_dtype)
    made, stacks = plain_experts(module), packed_stacks_of(module)
    for name, parameter in made._parameters.items():
        if parameter is not None and parameter.is_meta:
            own = None if name in stacks else getattr(module, name)
            values = stacks[name].dequantise() if own is None else own.detach()
            trains = own is not None and own.requires_grad
            made._parameters[name] = nn.Parameter(values.to(dtype, copy=own is not None), requires_grad=trains)
    made.training = module.training
    return made


def _linear(module: nn.Module, packed: PackedWeight, dtype: torch.dtype, in_any_dtype: bool) -> nn.Linear:
    bias: Any = module._parameters.get("bias", module._buffers.get("bias"))
    if bias is None and isinstance(module.__dict__.get("bias"), Tensor):
        bias = module.__dict__["bias"]
    out, inner = packed.shape
    cls = plain_class(module)
    if in_any_dtype:
        cls = AbstractDequantisedLinear if inherits_from_abc(module) else DequantisedLinear
    made: Any = cls(inner, out, bias=bias is not None, device="meta")
    weight: Any = module._parameters.get("weight")
    trains = bool(weight is not None and weight.requires_grad)
    made.weight = nn.Parameter(packed.dequantise().to(dtype), requires_grad=trains)
    if bias is not None:
        trains = isinstance(bias, nn.Parameter) and bias.requires_grad
        made.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=trains)
    return made
