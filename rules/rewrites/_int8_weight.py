"""The weight of an `Int8Linear` for rules that read or merge it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from surgery import PackedWeight, class_of


class Int8Weight(PackedWeight):
    """Codes of int8 with one scale for each row."""

    backend = "Int8Linear"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return any(f"{base.__module__}.{base.__name__}" == _CLASS for base in class_of(module).__mro__)

    @property
    def layout(self) -> str:
        return "int8, one scale for each row"

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.module.weight.shape
        return rows, columns

    @property
    def dtype(self) -> torch.dtype:
        return self.module.scale.dtype

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.module.weight, "scale": self.module.scale}

    def dequantise(self) -> Tensor:
        return self.module.weight.to(self.dtype) * self.module.scale[:, None]

    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        values = weight.detach().float()
        steps = self.module.scale.float()
        if scales == "refit":
            steps = values.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        codes = (values / steps[:, None]).round().clamp(-127, 127).to(torch.int8)
        return {"weight": codes, "scale": steps.to(self.dtype)}


_CLASS = "surgery.rules.rewrites.quantise.Int8Linear"
