"""Codes times scales, where a scale belongs to a block of rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.packed.e2m1 import e2m1_values

__all__ = ["block_of", "by_entry", "mxfp4_numbers", "scale_numbers", "scaled_codes"]


def block_of(sizes: Sequence[int], counts: Sequence[int], block: Sequence[int] | None) -> tuple[int, int]:
    """The rows and columns of a block, from the sizes of a matrix and the numbers of its blocks.

    `block`: what the settings say. The last block of a row or column may be smaller. Scales of other numbers, such as
    one for each half of two small matrices, divide the sizes.
    """
    if block is not None and all(-(-n // b) == c for n, b, c in zip(sizes, block, counts, strict=True)):
        return min(block[0], sizes[0]), min(block[1], sizes[1])
    return -(-sizes[0] // counts[0]), -(-sizes[1] // counts[1])


def by_entry(scales: Tensor, sizes: Sequence[int], block: Sequence[int]) -> Tensor:
    """The scale of each entry of matrices (…, rows, columns)."""
    (rows, columns), (high, wide) = block, sizes
    return scales.repeat_interleave(rows, -2)[..., :high, :].repeat_interleave(columns, -1)[..., :wide]


def scale_numbers(stored: Tensor) -> Tensor:
    """Scales in float32. Bytes are exponents with a bias of 127."""
    return torch.exp2(stored.float() - 127) if stored.dtype is torch.uint8 else stored.float()


def scaled_codes(codes: Tensor, scales: Tensor, block: Sequence[int] | None) -> Tensor:
    """The numbers of 8-bit floats, or of pairs of 4-bit floats in bytes, in float32."""
    eight = codes.dtype.is_floating_point
    values = codes.float() if eight else e2m1_values(codes.view(torch.uint8))
    numbers, sizes = scale_numbers(scales), values.shape[-2:]
    numbers = numbers if numbers.dim() == values.dim() else numbers.reshape(*values.shape[:-2], -1, 1)
    used = block_of(sizes, numbers.shape[-2:], block if eight else None)
    return values.mul_(by_entry(numbers, sizes, used))


def mxfp4_numbers(blocks: Tensor, scales: Tensor) -> Tensor:
    """The numbers (experts, in, out) of MXFP4 blocks (experts, out, blocks, 16) and their exponents, in float32."""
    values = torch.ldexp(e2m1_values(blocks), scales.int().unsqueeze(-1) - 127)
    return values.flatten(-2).mT.contiguous()
