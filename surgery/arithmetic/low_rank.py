"""Computes low-rank changes of weights with the same bits on every device and with any number of threads.

A floating-point matmul depends on threads, device and BLAS. Here the factors are first rounded to integers times a
power of two for each row of B and each column of A. The integers are so small that float64 represents every product
and every partial sum exactly, so the order of summation does not matter.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from surgery.errors import MergeError

# Beyond 2^±500, sums of products could leave float64's exponents: larger factors are not exact, smaller ones are
# rounded to this grid.
_LARGEST, _SMALLEST = 2.0**500, 2.0**-500
_EXPONENT = 0x7FF0_0000_0000_0000
_SCRATCH_LIMIT = 1 << 21


@dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank change of a weight: W' = gain ⊙ (W + ΔW) with ΔW = (B · scale) @ A in the weight's shape.

    >>> change = LowRank(B=torch.ones(3, 2), A=torch.ones(2, 4), scale=0.5)
    >>> change.delta((3, 4))[0]
    tensor([1., 1., 1., 1.])

    Args:
        B: Shape (m, r), for a weight with m rows of n entries, in any floating dtype.
        A: Shape (r, n), in any floating dtype.
        scale: A number, or one number for each rank component, (r,). Default 1.
        groups: The number g of groups of a grouped convolution. B is then (m, r/g), and the j-th block of m/g rows is
            B_j @ A_j, where A_j is the j-th block of r/g rows of A. For a stack of matrices (g, k, n), such as a
            layer's experts, B has g · k rows, and the matrices are the groups. Default 1.
        gain: Shape (m,), a factor for each row, or a shape that broadcasts to the weight. Default None.
    """

    B: Tensor
    A: Tensor
    scale: float | Tensor = 1.0
    groups: int = 1
    gain: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def delta(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns ΔW on B's device. Its bits do not depend on device, threads or the order of the rank components.

        The error relative to the largest products is about 1e-7 at rank 8 and 4e-7 at rank 256. With `dtype` float64,
        ΔW is float64 with an error of about 1e-15; otherwise it is float32. Raises MergeError if shapes do not fit.
        """
        self.check(shape)
        if self.B.is_complex() or self.A.is_complex():
            return self.complex_delta(shape, self.B.device).to(self.B.dtype)
        device = self.B.device if has_float64(self.B.device) else torch.device("cpu")
        product = Product(self, shape, dtype, device)
        out = torch.empty(product.height, product.width, dtype=product.compute, device=device)
        for i, j in product.tiles():
            out[i:j] = product(i, j)
        return out.reshape(tuple(shape)).to(self.B.device)

    def complex_delta(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Returns ΔW of complex factors in complex128: an ordinary matmul, whose bits may differ between machines."""
        B, A = (factor.detach().to(device, torch.complex128) for factor in (self.B, self.A))
        scale = self.scale.to(device).reshape(-1, 1) if isinstance(self.scale, Tensor) else self.scale
        B, A = B.unflatten(0, (self.groups, -1)), (A * scale).unflatten(0, (self.groups, -1))
        return (B @ A).reshape(tuple(shape))

    @staticmethod
    def join(changes: Sequence[LowRank]) -> LowRank:
        """Concatenate changes along the rank into one change, so that they are rounded once."""
        if any(change.groups != 1 or change.gain is not None for change in changes):
            raise MergeError("changes with groups or a gain can't be joined", fix="fold them one after the other")
        scales = [torch.as_tensor(c.scale, dtype=torch.float64, device=c.B.device).expand(len(c.A)) for c in changes]
        return LowRank(torch.cat([c.B for c in changes], 1), torch.cat([c.A for c in changes]), torch.cat(scales))

    def viewed_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the weight's shape as the factors view it: a stack of matrices is one matrix of all their rows."""
        stacked = len(shape) > 2 and len(self.B) == shape[0] * shape[1] != shape[0]
        return (len(self.B), *shape[2:]) if stacked else tuple(shape)

    def check(self, shape: Sequence[int], where: str = "") -> None:
        """Raise MergeError unless the factors fit a weight of this shape."""
        g, rank, viewed = self.groups, len(self.A), self.viewed_shape(shape)
        m, n = matrix_shape(viewed) if viewed else (0, 0)
        fits = bool(shape) and g >= 1 and rank >= g and rank % g == 0 and m % g == 0
        fits = fits and tuple(self.B.shape) == (m, rank // g) and tuple(self.A.shape) == (rank, n)
        if isinstance(self.scale, Tensor):
            fits = fits and tuple(self.scale.shape) in ((), (rank,))
        if self.gain is not None:
            fits = fits and (tuple(self.gain.shape) == (m,) or _broadcasts(self.gain.shape, viewed))
        if not fits:
            parts = {name: tuple(tensor.shape) for name, tensor in self._tensors().items()}
            raise MergeError(
                f"a weight of shape {tuple(shape)} can't take {', '.join(f'{k} {v}' for k, v in parts.items())}",
                where=where or None,
                why=f"B must be ({m}, r{f'/{g}' if g != 1 else ''}), A (r, {n}), scale a number or (r,), "
                f"gain ({m},) or broadcast to the weight",
            )

    def snapshot(self) -> LowRank:
        """Returns a copy on the CPU, which later training does not change."""
        return replace(self, **{name: t.detach().to("cpu", copy=True) for name, t in self._tensors().items()})

    def gains(self, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Returns the gain and its inverse (to within rounding) in the weight's shape, or (None, None)."""
        if self.gain is None:
            return None, None
        gain = self.gain.detach().to(weight.device, compute_dtype(weight.dtype))
        if gain.dim() == 1 and len(gain) == len(weight):
            gain = gain.view(-1, *[1] * (weight.dim() - 1))
        inverse = 1 / gain
        # A gain of 0 destroys the row. Corrections restore it, but they must start from a finite number.
        inverse = torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))
        return gain.expand(weight.shape), inverse.expand(weight.shape)

    def _tensors(self) -> dict[str, Tensor]:
        fields = {"B": self.B, "A": self.A, "scale": self.scale, "gain": self.gain}
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


class Product:
    """ΔW by row tiles in the compute dtype: integer arithmetic if `exact`, else an ordinary matmul."""

    def __init__(
        self, change: LowRank, shape: Sequence[int], dtype: torch.dtype, device: torch.device, exact: bool = True
    ):
        (self.height, self.width), g = matrix_shape(change.viewed_shape(shape)), change.groups
        rank = len(change.A) // g
        self.compute = compute_dtype(dtype)
        # The factors are rounded on the CPU, where the snapshot is: device rounding does not matter, nothing waits.
        home, work = (torch.device("cpu"), torch.float64) if exact else (device, self.compute)
        B = change.B.detach().to(home, work).reshape(g, self.height // g, rank)
        A = change.A.detach().to(home, work).reshape(g, rank, self.width)
        if isinstance(change.scale, Tensor):
            scale = change.scale.detach().to(home, work)
            B = B * (scale.reshape(g, 1, -1) if scale.dim() else scale)
        elif change.scale != 1:
            B = B * change.scale
        count = (2 if dtype == torch.float64 else 1) if exact else 0
        parts = [_split(factor, dim, count) for factor, dim in ((B, 2), (A, 1))] if exact else [None]
        rounded = [part for part in parts if part is not None]
        self.exact = len(rounded) == 2
        self.B, self.A = ([t.to(device) for t in part] for part in (rounded if self.exact else ([B], [A])))
        self._memory: tuple[int, Tensor, Tensor] | None = None  # of the last tile on a CPU
        self._matrices = (self.B[0][0], self.A[0][0]) if g == len(self.B) == 1 else None  # of the usual case

    def __call__(self, i: int, j: int) -> Tensor:
        """Returns rows i to j of ΔW, valid until the next call. They are rows of one group, or whole groups."""
        wide, narrow = self._outputs(j - i)
        if self._matrices is not None:
            torch.mm(self._matrices[0][i:j], self._matrices[1], out=wide)
        else:
            self._sum_terms(i, j, wide)
        return narrow if narrow is wide else narrow.copy_(wide)

    def _outputs(self, rows: int) -> tuple[Tensor, Tensor]:
        """Memory for a tile in the dtype of the factors, and in the compute dtype."""
        if self._memory is not None and self._memory[0] == rows:
            return self._memory[1:]
        size, factor = (rows, self.width), self.B[0]
        wide = narrow = scratch("wide", size, factor.dtype, factor.device)
        if factor.dtype != self.compute:
            narrow = scratch("narrow", size, self.compute, factor.device)
        if factor.device.type == "cpu":
            self._memory = rows, wide, narrow
        return wide, narrow

    def _sum_terms(self, i: int, j: int, wide: Tensor) -> None:
        """Writes the products of all summands of factors, for rows of one group or whole groups."""
        per_group = self.B[0].shape[1]
        group, start = divmod(i, per_group)
        rows = slice(group, j // per_group)
        terms: Iterator[tuple[Tensor, Tensor]] = ((b, a) for b in self.B for a in self.A)
        for k, (b, a) in enumerate(terms):
            out = wide if k == 0 else torch.empty_like(wide)
            if start + j - i <= per_group:
                torch.mm(b[group, start : start + j - i], a[group], out=out)
            else:
                torch.bmm(b[rows], a[rows], out=out.view(-1, per_group, self.width))
            if k:
                wide += out  # each term is exact; their sum is rounded, always in this order

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Yields the first and last row of each tile."""
        # A tile's temporaries should stay in cache, but each tile costs some forty calls (on a GPU, launches).
        entries = 1 << 18 if self.B[0].device.type == "cpu" else 1 << 23
        per_group, limit = self.B[0].shape[1], max(1, entries // max(1, self.width))
        block = max(1, per_group if limit < per_group else limit // max(1, per_group) * per_group)
        for start in range(0, self.height if self.width else 0, block):
            end = min(start + block, self.height)
            for i in range(start, end, min(limit, block)):
                yield i, min(i + limit, end)


def _split(factor: Tensor, dim: int, count: int) -> list[Tensor] | None:
    """Split a factor into `count` summands with few bits, or return None if its values are too large or NaN.

    Each summand's entries are integers of at most `bits` bits times a power of two that is common to `dim`.
    """
    rest, summands = factor.numpy(), []  # factors are small, and numpy's calls cost half of torch's
    bits = (53 - (rest.shape[dim] - 1).bit_length()) // 2
    for _ in range(count):
        top = np.abs(rest).max(dim, keepdims=True, initial=_SMALLEST)
        if not top.max(initial=0.0) < _LARGEST:  # or NaN
            return None
        power = (top.view(np.int64) & _EXPONENT).view(np.float64)  # 2^⌊log₂ top⌋
        # Adding 1.5 · 2⁵² units of the last bit to keep rounds off all lower bits; the subtraction is exact.
        shift = power * (1.5 * 2.0 ** (53 - bits))
        summands.append(torch.from_numpy((rest + shift) - shift))
        if count > 1:
            rest = rest - summands[-1].numpy()
    return summands


def exact_parts(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor] | None:
    """Round the factors of many changes as `Product` does, or return None if values are too large or NaN.

    Shapes: B (k, m, r), A (k, r, n), in float64.
    """
    parts = [_split(factor, dim, 1) for factor, dim in ((B, 2), (A, 1))]
    rounded = [part[0] for part in parts if part is not None]
    return (rounded[0], rounded[1]) if len(rounded) == 2 else None


_memory = threading.local()
Role = Literal["wide", "narrow", "folded"]  # of scratch memory


def scratch(role: Role, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns uninitialised memory. On the CPU, each call with the same role and thread returns the same memory.

    Touching fresh memory for every weight would take as long as the arithmetic. A few megabytes stay allocated.
    """
    size = shape[0] * shape[1] * dtype.itemsize
    if device.type != "cpu" or not 0 < size <= _SCRATCH_LIMIT:
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = getattr(_memory, role, None)
    if buffer is None or len(buffer) < size:
        buffer = np.empty(size, np.uint8)
        setattr(_memory, role, buffer)
    return torch.from_numpy(buffer[:size]).view(dtype).view(shape)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_float64(device: torch.device) -> bool:
    return device.type != "mps"


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _broadcasts(small: Sequence[int], large: Sequence[int]) -> bool:
    tail = tuple(large)[len(large) - len(small) :] if len(small) <= len(large) else ()
    return len(tail) == len(small) and all(s in (1, t) for s, t in zip(small, tail, strict=True))
