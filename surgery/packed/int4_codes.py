"""torchao's `Int4Tensor`: signed 4-bit codes, two in a byte, with a scale and a shift for groups of inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["int4_tensors", "int4_values"]


def int4_values(codes: Tensor, scales: Tensor, shifts: Tensor) -> Tensor:
    """code · scale + shift in the scales' dtype. Codes are (…, out, in / 2), scales and shifts (…, groups, out)."""
    pairs = codes.view(torch.uint8)
    numbers = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
    signed = (numbers.to(torch.int8) ^ 8).sub_(8).float()
    grouped = signed.unflatten(-1, (scales.shape[-2], -1))
    values = grouped * scales.mT.unsqueeze(-1).float() + shifts.mT.unsqueeze(-1).float()
    return values.flatten(-2).to(scales.dtype)


def int4_tensors(old: Any, weight: Tensor, keep: bool) -> dict[str, Tensor]:
    """Codes, scales and shifts of new values, in the form of an `Int4Tensor`. `keep`: with its scales and shifts."""
    scales, shifts = old.scale, old.zero_point
    grouped = weight.float().unflatten(-1, (scales.shape[-2], -1))
    if not keep:
        if bool(shifts.any()) or old.activation_dtype is torch.bfloat16:
            low, high = grouped.amin(-1), grouped.amax(-1)
            steps = (high - low).clamp(min=1e-6) / 15
            scales, shifts = steps.mT.to(old.dtype), (low + steps * 8).mT.to(old.dtype)
        else:  # symmetric, as the kernels for 8-bit inputs need it
            scales, shifts = (grouped.abs().amax(-1).clamp(min=1e-6) / 8).mT.to(old.dtype), torch.zeros_like(shifts)
    steps, shift = (part.mT.unsqueeze(-1).float() for part in (scales, shifts))
    signed = ((grouped - shift) / steps).round().clamp(-8, 7).to(torch.int8).flatten(-2)
    pairs = (signed[..., 0::2] & 15) | (signed[..., 1::2] << 4)
    return {"qdata": pairs.contiguous(), "scale": scales.contiguous(), "zero_point": shifts.contiguous()}
