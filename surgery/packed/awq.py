"""AWQ in the layout "gemm": weights of a few bits in the buffers of AutoAWQ's and gptqmodel's modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from surgery.packed.bit_packing import WORD, pack_words, unpack_words
from surgery.packed.grids import fit_grid, nearest_codes
from surgery.packed.packed_weight import PackedWeight, register_packed
from surgery.packed.quantised_class import runs_more, short_names

__all__ = ["AwqWeight"]

_KERNELS = {"WQLinear_GEMM", "AwqTorchLinear", "TorchAtenAwqLinear", "AwqGEMMLinear", "AwqGEMMTritonLinear"}
_OTHERS = {"_MlxLinearContract", "ParoLinear"}
_BUFFERS = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which column of eight lies at each place of a word of 4-bit codes


@register_packed
class AwqWeight(PackedWeight):
    """The weight of AutoAWQ's `WQLinear_GEMM` or of gptqmodel's `AwqTorchLinear`.

    `qweight` holds codes (in, out), packed along the outputs; 4-bit codes are packed in the order of `ORDER`. `qzeros`
    holds the zero points of groups of consecutive inputs in the same way. The weight is scales * (code - zero).

    Source: Lin et al. 2023, arXiv:2306.00978; AutoAWQ's `awq/utils/packing_utils.py`.
    """

    backend = "awq"
    auxiliary = frozenset(("qzeros", "wf_unsqueeze_zero", "wf_unsqueeze_neg_one"))

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        names = short_names(module)
        if not names & _KERNELS or names & _OTHERS or any(name not in module._buffers for name in _BUFFERS):
            return False
        if runs_more(module):
            return False
        bits = _bits(module)
        weight, scales = module._buffers["qweight"], module._buffers["scales"]
        if type(bits) is not int or weight is None or scales is None or weight.dtype is not torch.int32:
            return False
        return weight.shape[1] == -(-scales.shape[1] * bits // WORD) and weight.shape[0] % scales.shape[0] == 0

    @property
    def layout(self) -> str:
        return f"{_bits(self.module)} bits, groups of {self._group_size}, gemm"

    @property
    def activations(self) -> str | None:
        return None if self.dtype is torch.float32 else f"{str(self.dtype).removeprefix('torch.')}, not scaled"

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.scales.shape[1], self.module.qweight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.module.scales.dtype

    @property
    def _group_size(self) -> int:
        return self.module.qweight.shape[0] // self.module.scales.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self.module, name) for name in _BUFFERS}

    def dequantise(self) -> Tensor:
        module, size = self.module, self._group_size
        steps = self._unpack("qweight").to(torch.int16) - self._unpack("qzeros").to(torch.int16).repeat_interleave(
            size, 0
        )
        return (steps * module.scales.repeat_interleave(size, 0)).t().contiguous()

    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        module, size, bits = self.module, self._group_size, _bits(self.module)
        rows = weight.detach().float().t()
        if scales == "keep":
            steps, zeros = module.scales.clone(), self._unpack("qzeros").long()
        else:
            groups = torch.arange(rows.shape[0], device=rows.device) // size
            steps, zeros = fit_grid(
                rows,
                groups,
                module.scales.shape[0],
                bits=bits,
                symmetric=False,
                zeros=(0, 2**bits - 1),
                dtype=module.scales.dtype,
            )
        codes = nearest_codes(rows, steps.repeat_interleave(size, 0), zeros.repeat_interleave(size, 0), bits)
        return {"qweight": self._pack(codes), "qzeros": self._pack(zeros.to(torch.uint8)), "scales": steps}

    def _unpack(self, name: str) -> Tensor:
        """The codes of a buffer in uint8, (rows, out)."""
        bits = _bits(self.module)
        codes = unpack_words(getattr(self.module, name).t(), bits, self.shape[0]).t()
        return _reorder(codes, [ORDER.index(column) for column in range(len(ORDER))]) if bits == 4 else codes

    def _pack(self, codes: Tensor) -> Tensor:
        bits = _bits(self.module)
        ordered = _reorder(codes, list(ORDER)) if bits == 4 else codes
        return pack_words(ordered.t(), bits, self.module.qweight.shape[1]).t().contiguous()

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        super().write(tensors)
        clear = getattr(self.module, "clear_weight_cache", None)
        if clear is not None:
            clear()


def _bits(module: nn.Module) -> int:
    return getattr(module, "w_bit", getattr(module, "bits", None))  # type: ignore[return-value]


def _reorder(codes: Tensor, columns: list[int]) -> Tensor:
    return codes.unflatten(1, (-1, len(columns)))[:, :, columns].flatten(1)
