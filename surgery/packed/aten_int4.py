"""4-bit codes as torch's CPU kernel reads them: gptqmodel's layers after their first call in evaluation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from surgery.packed.grids import fit_grid
from surgery.packed.packed_weight import PackedWeight, register_packed
from surgery.packed.quantised_class import runs_more, short_names

__all__ = ["AtenInt4Weight"]

_KERNELS = {"TorchAtenLinear", "TorchAtenAwqLinear"}


@register_packed
class AtenInt4Weight(PackedWeight):
    """The weight of gptqmodel's `TorchAtenLinear` (GPTQ) or `TorchAtenAwqLinear` (AWQ) with its codes rearranged.

    These layers rearrange their buffers when they are first called in evaluation. Before that, they have the buffers of
    GPTQ or AWQ. The weight is scale * (code - 8) + shift, for groups of consecutive inputs of the kernel.
    """

    backend = "gptqmodel-aten"
    auxiliary = frozenset(("qweight", "qzeros", "scales", "g_idx", "wf_unsqueeze_zero", "wf_unsqueeze_neg_one"))

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        rearranged = bool(short_names(module) & _KERNELS) and getattr(module, "linear_mode", None) == "inference"
        return rearranged and isinstance(getattr(module, "scales_and_zeros", None), Tensor) and not runs_more(module)

    @property
    def layout(self) -> str:
        return f"4 bits, groups of {self.module.group_size}, torch's CPU kernel"

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.module.scales_and_zeros.dtype

    @property
    def passes_gradient(self) -> bool:
        return False

    def tensors(self) -> dict[str, Tensor]:
        return {"int4pack": self.module.qweight, "scales_and_zeros": self.module.scales_and_zeros}

    def dequantise(self) -> Tensor:
        stored, (out, inner) = self.tensors(), self.shape
        unit = torch.eye(inner, dtype=self.dtype, device=self.device)
        columns = torch.ops.aten._weight_int4pack_mm_for_cpu(
            unit, stored["int4pack"], self.module.group_size, stored["scales_and_zeros"]
        )
        weight = columns.new_empty(out, inner)
        weight[:, self._inputs()] = columns.t()
        return weight

    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        stored, size = self.tensors(), self.module.group_size
        rows = weight.detach().float()[:, self._inputs()].t()  # as the kernel orders its inputs
        groups = torch.arange(rows.shape[0], device=rows.device) // size
        grid = stored["scales_and_zeros"].clone()
        if scales == "refit":
            steps, zeros = fit_grid(
                rows, groups, grid.shape[0], bits=4, symmetric=False, zeros=(0, 15), dtype=self.dtype
            )
            grid = torch.stack((steps, (steps * (8 - zeros)).to(self.dtype)), 2).contiguous()
        step, shift = grid.float().unbind(2)
        codes = (torch.round((rows - shift[groups]) / step[groups]) + 8).clamp(0, 15).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.t().contiguous(), 1)
        return {"int4pack": packed.contiguous(), "scales_and_zeros": grid}

    def _inputs(self) -> Tensor:
        """Which input lies at each place of the kernel: act-order sorts them by group."""
        order = getattr(self.module, "ret_idx", None)
        count = self.module.in_features
        return torch.arange(count, device=self.device) if order is None else order.long()
