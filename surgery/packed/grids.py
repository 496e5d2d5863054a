"""Grids of numbers for groups of a weight's inputs: scales and zero points, and the nearest codes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fit_grid", "nearest_codes"]


def fit_grid(
    weight: Tensor,
    groups: Tensor,
    count: int,
    *,
    bits: int,
    symmetric: bool,
    zeros: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns scales in `dtype` and zero points in int64, both (groups, out): those of the least and greatest weight.

    A value of the grid is scale * (code - zero). Zero is always on the grid.

    Args:
        weight: float32 (in, out).
        groups: the group of each input, (in,).
        count: how many groups there are.
        bits: the bits of a code.
        symmetric: whether the zero point is the middle of the codes.
        zeros: the least and greatest zero point that can be stored.
        dtype: the dtype in which scales are stored. Codes are computed with the scales as they are stored.
    """
    highest = 2**bits - 1
    index = groups.long().unsqueeze(1).expand_as(weight)
    start = weight.new_zeros(count, weight.shape[1])
    least = start.scatter_reduce(0, index, weight, "amin")
    greatest = start.scatter_reduce(0, index, weight, "amax")
    if symmetric:
        greatest = torch.maximum(greatest, -least)
        least = -greatest
    empty = (least == 0) & (greatest == 0)
    scale = (greatest - least).masked_fill(empty, 2.0) / highest
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-least / scale)
    stored = zero.clamp(*zeros)
    # A zero point that cannot be stored moves the grid, so its steps become wider.
    needed = torch.maximum(-least / stored.clamp_min(1), greatest / (highest - stored).clamp_min(1))
    scale = torch.where(stored != zero, torch.maximum(scale, needed), scale)
    return scale.to(dtype).clamp_min(torch.finfo(dtype).smallest_normal), stored.long()


def nearest_codes(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Returns the codes, uint8, of the nearest values of the grid. `scales` and `zeros` are those of each weight."""
    return (torch.round(weight / scales.float()) + zeros).clamp(0, 2**bits - 1).to(torch.uint8)
