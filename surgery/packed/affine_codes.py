"""Codes of a packed weight whose values are (code - zero point) · scale, as ONNX's DequantizeLinear computes them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["AffineCodes"]


@dataclass(frozen=True, eq=False)
class AffineCodes:
    """Integer codes (out, in) with a scale and a zero point for each run of inputs of a row.

    Attributes:
        codes: the codes, int8 or uint8. With 4 bits they are in -8 … 7, or in 0 … 15.
        scales: (out, runs), in the dtype of the dequantised weight.
        zeros: (out, runs), in the dtype of the codes; None: all zero.
        bits: 4 or 8.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int

    @property
    def block(self) -> int:
        """The number of inputs that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def values(self) -> Tensor:
        """The dequantised weight, by plain arithmetic."""
        zeros = 0 if self.zeros is None else self.zeros.repeat_interleave(self.block, 1).to(self.scales.dtype)
        return (self.codes.to(self.scales.dtype) - zeros) * self.scales.repeat_interleave(self.block, 1)
