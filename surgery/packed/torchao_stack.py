"""Stacks of experts that torchao quantised: parameters of three dimensions, of a tensor subclass of torchao."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.errors import SiteError
from surgery.packed.int4_codes import int4_tensors, int4_values
from surgery.packed.packed_stack import TORCHAO, PackedStack
from surgery.packed.quantised_class import base_of
from surgery.packed.torchao import quantised_as

__all__ = ["TorchaoStack", "plain_experts", "stacks_of"]


class TorchaoStack(PackedStack):
    """A stack that torchao's `FqnToConfig` quantised: int8 or float8 with a scale for each row, or int4 with groups."""

    backend = "torchao"

    @property
    def transposed(self) -> bool:  # type: ignore[override]
        return bool(getattr(self.module, "is_transposed", False))

    @property
    def layout(self) -> str:
        stack = self._stack
        codes = "int4" if _is_int4(stack) else str(stack.qdata.dtype).removeprefix("torch.")
        size = int(stack.block_size[-1])
        return f"{codes}, {'one scale for each row' if size == stack.shape[-1] else f'groups of {size}'}"

    @property
    def dtype(self) -> torch.dtype:
        return self._stack.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, rows, columns = self._stack.shape
        return experts, rows, columns

    def tensors(self) -> dict[str, Tensor]:
        stack = self._stack
        names = ("qdata", "scale", "zero_point") if _is_int4(stack) else stack.__tensor_flatten__()[0]
        return {f"{self.name}.{name}": getattr(stack, name) for name in names}

    def dequantise(self) -> Tensor:
        stack = self._stack
        with torch.no_grad():
            return int4_values(*self.tensors().values()) if _is_int4(stack) else stack.dequantize()

    def dequantise_experts(self, experts: Tensor) -> Tensor:
        stack = self._stack
        with torch.no_grad():
            if _is_int4(stack):
                return int4_values(*(tensor[experts] for tensor in self.tensors().values()))
            return torch.stack([stack[number].dequantize() for number in experts.tolist()])

    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        stack, weight = self._stack, weight.detach()
        if tuple(weight.shape) != self.shape or not bool(weight.isfinite().all()):
            raise SiteError(
                f"a stack of {tuple(weight.shape)} can't be quantised as {self.name}",
                why=f"the codes are of finite numbers, and the stack is {self.shape}",
            )
        if _is_int4(stack):
            made = int4_tensors(stack, weight, scales == "keep")
        else:
            rows = zip(range(len(stack)), weight.to(self.dtype), strict=True)
            parts = [quantised_as(stack[number], values, scales == "keep") for number, values in rows]
            names = stack.__tensor_flatten__()[0]
            made = {name: torch.stack([getattr(part, name) for part in parts]) for name in names}
        return {f"{self.name}.{name}": tensor.clone() for name, tensor in made.items()}

    @property
    def _stack(self) -> Any:
        stack = self.module._parameters[self.name]
        return stack.data if type(stack) is nn.Parameter else stack


def stacks_of(module: nn.Module) -> dict[str, TorchaoStack]:
    """The stacks of a module, whatever its class."""
    named = {name: tensor for name, tensor in module._parameters.items() if tensor is not None and tensor.dim() == 3}
    return {name: TorchaoStack(module, name) for name, tensor in named.items() if type(tensor).__name__ in TORCHAO}


def plain_experts(module: nn.Module) -> nn.Module:
    """A module of the same class and settings with plain parameters in the place of the stacks, on the meta device."""
    cls = base_of(module)
    made = object.__new__(cls)
    made.__dict__.update(module.__dict__)
    made.__dict__.update(_parameters=dict(module._parameters), _buffers={})
    for name, stack in stacks_of(module).items():
        made._parameters[name] = nn.Parameter(torch.empty(stack.shape, device="meta"), requires_grad=False)
    return made


def _is_int4(stack: Any) -> bool:
    return type(stack).__name__ == "Int4Tensor"
