"""MXFP4: 4-bit floats (e2m1) in blocks of 32 with a power of two for each block, in transformers' gpt-oss experts."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.errors import SiteError
from surgery.packed.e2m1 import e2m1_codes, e2m1_values
from surgery.packed.packed_stack import PackedStack

__all__ = ["ATTRIBUTES", "Mxfp4Stack", "plain_experts", "stacks_of"]

# `Mxfp4GptOssMLP` calls the kernels beside the experts' forward, but calls the forward of experts that have this mark.
ATTRIBUTES = {"_is_hooked": True}

_NAMES = ("gate_up_proj", "down_proj")
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
    auxiliary = frozenset(("gate_up_proj_precision_config", "down_proj_precision_config"))
    transposed = True

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
        return self._values(self._blocks(), self._scales())

    def dequantise_experts(self, experts: Tensor) -> Tensor:
        return self._values(self._blocks()[experts], self._scales()[experts])

    def _values(self, blocks: Tensor, scales: Tensor) -> Tensor:
        stack = torch.empty(len(blocks), *self.shape[1:], dtype=self.dtype, device=blocks.device)
        for expert, codes, exponents in zip(stack, blocks, scales, strict=True):  # one at a time: less memory
            values = torch.ldexp(e2m1_values(codes), exponents.int().unsqueeze(-1) - _BIAS)
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
            codes.copy_(e2m1_codes(torch.ldexp(values, _BIAS - exponent.int().unsqueeze(-1))))
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


def plain_experts(module: nn.Module) -> nn.Module:
    """A new `GptOssExperts` of the same sizes and settings, on the meta device."""
    made: Any = import_module("transformers.models.gpt_oss.modeling_gpt_oss")
    old: Any = module
    sizes = {"num_local_experts": old.num_experts, "hidden_size": old.hidden_size}
    config = made.GptOssConfig(intermediate_size=old.intermediate_size, num_hidden_layers=1, **sizes)
    config._experts_implementation = "eager"
    with torch.device("meta"):
        new = made.GptOssExperts(config)
    new.__dict__.update(alpha=old.alpha, limit=old.limit, **ATTRIBUTES)
    return new


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
