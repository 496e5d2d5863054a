"""8-bit floats with scales, in transformers' `FP8Linear`, `CompressedTensorsFP8Linear` and `FbgemmFp8Linear`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from surgery.packed.packed_weight import PackedWeight, register_packed
from surgery.packed.quantised_class import short_names

__all__ = ["Fp8Weight"]

# The name of the scales by the name of the class.
_KERNELS = {
    "FP8Linear": "weight_scale_inv",
    "CompressedTensorsFP8Linear": "weight_scale",
    "FbgemmFp8Linear": "weight_scale",
}
_CODES = (torch.float8_e4m3fn, torch.float8_e5m2)


@register_packed
class Fp8Weight(PackedWeight):
    """The weight of a Linear of transformers whose kernel multiplies 8-bit floats: code * scale.

    There is one scale for the weight, for each row, or for each block of rows and columns. Kernels compute with the
    scales in float32, and round the input to 8 bits, too.
    """

    backend = "transformers-fp8"
    auxiliary = frozenset(("input_scale_ub", "activation_scale"))

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        names = short_names(module)
        if not isinstance(module, nn.Linear) or not names & _KERNELS.keys() or "FP8GroupedLinear" in names:
            return False
        weight = module._parameters.get("weight")
        return weight is not None and weight.dtype in _CODES and weight.dim() == 2

    @property
    def layout(self) -> str:
        block = self._block
        whole = block == self.shape
        rows = "one scale for each row" if block == (1, self.shape[1]) else f"blocks of {block[0]} × {block[1]}"
        return f"{str(self.module.weight.dtype).removeprefix('torch.')}, {'one scale' if whole else rows}"

    @property
    def activations(self) -> str:
        static = getattr(self.module, "activation_scheme", "dynamic") == "static"
        return f"float8, {'one scale from calibration' if static else 'scales of each call'}"

    @property
    def passes_gradient(self) -> bool:
        return self._scale_name == "weight_scale_inv"  # the other kernels are for inference alone

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.module.weight.shape
        return rows, columns

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def tensors(self) -> dict[str, Tensor]:
        return {
            "weight": self.module.weight.detach(),
            self._scale_name: getattr(self.module, self._scale_name).detach(),
        }

    def dequantise(self) -> Tensor:
        return self.module.weight.detach().float() * self._by_weight(self._scales().float())

    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        old = self.tensors()
        stored, codes = old[self._scale_name], old["weight"].dtype
        weight = weight.detach().float()
        greatest = torch.finfo(codes).max
        if scales == "keep":
            steps = stored.clone()
        else:
            steps = self._largest(weight) / greatest
            steps = steps.masked_fill(steps == 0, 1)
            if stored.dtype is torch.float8_e8m0fnu:  # powers of two; a smaller one would cut the largest weight
                steps = torch.exp2(torch.log2(steps).ceil())
            steps = steps.view(stored.shape).to(stored.dtype)
        ratio = weight / self._by_weight(steps.float().view(self._scales().shape))
        return {"weight": ratio.clamp(-greatest, greatest).to(codes), self._scale_name: steps}

    @property
    def _scale_name(self) -> str:
        return next(_KERNELS[name] for name in _KERNELS if name in short_names(self.module))

    def _scales(self) -> Tensor:
        """The scales as a matrix: a row for each row of blocks."""
        scales = getattr(self.module, self._scale_name).detach()
        if self._scale_name == "weight_scale_inv" and scales.dim() == 2:
            return scales
        return scales.reshape(-1, 1)

    @property
    def _block(self) -> tuple[int, int]:
        rows, columns = self._scales().shape
        block = getattr(self.module, "block_size", None)
        if block is not None and rows * columns > 1:
            return block[0], block[1]
        return -(-self.shape[0] // rows), -(-self.shape[1] // columns)

    def _by_weight(self, scales: Tensor) -> Tensor:
        """The scale of each weight."""
        rows, columns = self._block
        return scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: self.shape[0], : self.shape[1]]

    def _largest(self, weight: Tensor) -> Tensor:
        """The largest absolute value of each block."""
        (rows, columns), (high, wide) = self._block, self._scales().shape
        padded = weight.new_zeros(high * rows, wide * columns)
        padded[: weight.shape[0], : weight.shape[1]] = weight.abs()
        return padded.view(high, rows, wide, columns).amax((1, 3))
