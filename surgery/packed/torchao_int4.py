"""The weight of a Linear as torchao's `Int4Tensor`, which only a GPU's kernel multiplies with."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.packed.int4_codes import int4_tensors, int4_values
from surgery.packed.packed_weight import PackedWeight, register_packed

__all__ = ["TorchaoInt4Weight"]


@register_packed
class TorchaoInt4Weight(PackedWeight):
    """The weight of a Linear after torchao's `Int4WeightOnlyConfig`: code · scale + shift, for groups of inputs.

    A tensor with a scale of the inputs (`act_pre_scale`) is not read.
    """

    backend = "torchao"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        weight: Any = module._parameters.get("weight")
        plain = type(weight).__name__ == "Int4Tensor" and isinstance(module, nn.Linear)
        return plain and weight.dim() == 2 and weight.act_pre_scale is None

    @property
    def layout(self) -> str:
        return f"int4, groups of {self._weight.block_size[-1]}"

    @property
    def activations(self) -> str | None:
        rounds = self._weight.activation_dtype is torch.float8_e4m3fn
        return "float8_e4m3fn, one scale for each row" if rounds else None

    @property
    def passes_gradient(self) -> bool:
        return False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self._weight.shape
        return rows, columns

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self._weight, name) for name in ("qdata", "scale", "zero_point")}

    def dequantise(self) -> Tensor:
        return int4_values(*self.tensors().values())

    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        made = int4_tensors(self._weight, weight.detach(), scales == "keep")
        return {name: tensor.clone() for name, tensor in made.items()}

    @property
    def _weight(self) -> Any:
        weight = self.module.weight
        return weight.data if type(weight) is nn.Parameter else weight
