"""4-bit floats (e2m1), two in a byte, the first in the low half."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["e2m1_codes", "e2m1_values"]

_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the codes 0 to 7; 8 to 15 are the same numbers with a minus


def e2m1_values(pairs: Tensor) -> Tensor:
    """The numbers of bytes (…, n), in float32: (…, 2 n)."""
    levels = torch.tensor((*_LEVELS, *(-level for level in _LEVELS)), device=pairs.device)
    return levels[torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2).int()]


def e2m1_codes(numbers: Tensor) -> Tensor:
    """The bytes of the nearest levels of numbers (…, 2 n). Of two as near levels, that of the even code."""
    levels = torch.tensor(_LEVELS, device=numbers.device)
    middles = (levels[1:] + levels[:-1]) / 2
    middles[1::2] = middles[1::2].nextafter(levels[:1])  # from an odd code, a number in the middle goes up
    codes = torch.bucketize(numbers.abs().contiguous(), middles)
    nearest = (codes + 8 * numbers.signbit()).to(torch.uint8)
    return nearest[..., 0::2] | nearest[..., 1::2] << 4
