"""MXFP4: 4-bit floats (e2m1) in blocks of 32 with a power of two for each block, in transformers' gpt-oss experts."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.errors import SiteError
from surgery.packed.packed_stack import PackedStack

__all__ = ["Mxfp4Stack", "stacks_of"]

_NAMES = ("gate_up_proj", "down_proj")
_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the codes 0 to 7; 8 to 15 are the same numbers with a minus
_BIAS = 127  # of the exponents


class Mxfp4Stack(PackedStack):
    """A stack of `Mxfp4GptOssExperts`: level · 2^(scale - 127). Two codes are in a byte, the first in the low half.

    Codes are (experts, out, blocks, 16) bytes and scales (experts, out, blocks), as in gpt-oss' checkpoint. The
    dequantised stack is (experts, in, out) in bfloat16, as the parameter of `GptOssExperts` after
    `Mxfp4Config(dequantize=True)`.

    The module has them under the checkpoint's names (`gate_up_proj_blocks`, `gate_up_proj_scales`), or in the objects
    of the triton kernels, in the order of the GPU's kernel. The layout of these objects gives the checkpoint's order.
    """

    backend = "transformers-mxfp4"

    @property
    def layout(self) -> str:
        return "mxfp4 (e2m1), blocks of 32"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, out, blocks = self._scales().shape
        return experts, blocks * 32, out

    def tensors(self) -> dict[str, Tensor]:
        blocks, scales = self._stored()
        if isinstance(blocks, Tensor):
            return {f"{self.name}_blocks": blocks.detach(), f"{self.name}_scales": scales.detach()}
        return {f"{self.name}_blocks": blocks.storage.data, f"{self.name}_scales": scales.storage.data}

    def dequantise(self) -> Tensor:
        blocks, scales = self._blocks(), self._scales()
        levels = torch.tensor((*_LEVELS, *(-level for level in _LEVELS)), device=blocks.device)
        stack = torch.empty(self.shape, dtype=self.dtype, device=blocks.device)
        for expert, codes, exponents in zip(stack, blocks, scales, strict=True):  # one at a time: less memory
            pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
            values = torch.ldexp(levels[pairs.int()], exponents.int().unsqueeze(-1) - _BIAS)
            expert.copy_(values.flatten(-2).mT)
        return stack

    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        if tuple(weight.shape) != self.shape or not bool(weight.isfinite().all()):
            raise SiteError(
                f"a stack of {tuple(weight.shape)} can't be quantised as {self.name}",
                why=f"mxfp4 stores finite numbers, and the stack is (experts, in, out) = {self.shape}",
            )
        exponents, blocks = self._scales().clone(), torch.empty_like(self._blocks())
        for matrix, codes, exponent in zip(weight.detach(), blocks, exponents, strict=True):
            values = matrix.to(blocks.device).float().mT.unflatten(-1, (-1, 32))
            if scales == "refit":
                exponent.copy_(_fitted(values))
            nearest = _nearest(torch.ldexp(values, _BIAS - exponent.int().unsqueeze(-1)))
            codes.copy_(nearest[..., 0::2] | nearest[..., 1::2] << 4)
        return self._arranged(blocks, exponents)

    def _stored(self) -> tuple[Any, Any]:
        """Codes and scales: tensors, or the objects of the triton kernels."""
        if isinstance(blocks := getattr(self.module, f"{self.name}_blocks", None), Tensor):
            return blocks, getattr(self.module, f"{self.name}_scales")
        config: Any = getattr(self.module, f"{self.name}_precision_config", None)
        return getattr(self.module, self.name), getattr(config, "weight_scale", None)

    def _blocks(self) -> Tensor:
        """The codes, (experts, out, blocks, 16)."""
        blocks = _in_order(self._stored()[0])
        return blocks if blocks.dim() == 4 else blocks.unflatten(-1, (-1, 16))

    def _scales(self) -> Tensor:
        """The scales, (experts, out, blocks)."""
        return _in_order(self._stored()[1])

    def _arranged(self, blocks: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """Codes and scales by the names of `tensors`, in the order in which they are stored."""
        arranged = [
            values if isinstance(stored, Tensor) else stored.storage.layout.swizzle_data(values.flatten(2).mT)
            for stored, values in zip(self._stored(), (blocks, scales), strict=True)
        ]
        return dict(zip(self.tensors(), arranged, strict=True))


def stacks_of(module: nn.Module) -> dict[str, Mxfp4Stack]:
    """The stacks of `Mxfp4GptOssExperts`; none before codes and scales are loaded."""
    stacks = {name: Mxfp4Stack(module, name) for name in _NAMES}
    return {name: stack for name, stack in stacks.items() if all(map(_is_stored, stack._stored()))}


def _is_stored(stored: Any) -> bool:
    if isinstance(stored, Tensor):
        return stored.dtype is torch.uint8 and stored.device.type != "meta"
    return hasattr(getattr(stored, "storage", None), "layout")


def _in_order(stored: Any) -> Tensor:
    """The tensor in the checkpoint's order."""
    if isinstance(stored, Tensor):
        return stored.detach()
    return stored.storage.layout.unswizzle_data(stored.storage.data).mT


def _fitted(values: Tensor) -> Tensor:
    """The least exponents, with the bias, whose blocks have no number above the greatest level, as the kernels' own."""
    fraction, power = torch.frexp(values.abs().amax(-1))  # fraction · 2^power; the greatest level, 6, is 0.75 · 2^3
    exponent = torch.where(fraction > 0.75, power - 2, power - 3) + _BIAS
    return torch.where(fraction == 0, 0, exponent).clamp(0, 254).to(torch.uint8)


def _nearest(numbers: Tensor) -> Tensor:
    """The codes of the nearest levels; of two that are as near, the even code."""
    levels = torch.tensor(_LEVELS, device=numbers.device)
    middles = (levels[1:] + levels[:-1]) / 2
    middles[1::2] = middles[1::2].nextafter(levels[:1])  # from an odd code, a number in the middle goes up
    codes = torch.bucketize(numbers.abs().contiguous(), middles)
    return (codes + 8 * numbers.signbit()).to(torch.uint8)
