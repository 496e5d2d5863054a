"""The best low-rank factors of a matrix, of a rank or within a tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.arithmetic.low_rank import has_float64
from surgery.errors import SurgeryError

__all__ = ["RankChoice", "truncated_svd", "truncated_svd_of_product"]

_SMALL = 1024  # up to this side, all singular values are computed
_DOUBLE = 1 << 22  # up to this many entries, they are computed in float64


@dataclass(frozen=True)
class RankChoice:
    """The rank of a result: at most `rank`, and as low as `tolerance` allows.

    `tolerance`: the share of the change's Frobenius norm that may be lost. With a rank alone, every site has that rank,
    and factors are filled up with zeros. With neither, only singular values are left out that are rounding errors:
    those of float32, and those up to `noise`.
    """

    rank: int | None = None
    tolerance: float | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise SurgeryError(f"{self.rank!r} is not a rank", fix="give a whole number from 1, or None")
        if self.tolerance is not None and not (
            isinstance(self.tolerance, (int, float))
            and not isinstance(self.tolerance, bool)
            and 0 <= self.tolerance < 1
        ):
            what = f"{self.tolerance!r} is not a tolerance"
            raise SurgeryError(what, fix="give the share of the change that may be lost, from 0 to below 1, or None")

    @property
    def uniform(self) -> bool:
        """Whether every site has the same rank."""
        return self.rank is not None and self.tolerance is None

    def of(self, values: Tensor, norm: float, sides: tuple[int, int]) -> int:
        """Returns the rank for singular values (…, k) in falling order, which may be the largest values alone."""
        squares = values.double().square().reshape(-1, values.shape[-1]).sum(0)
        most = min(self.rank or len(squares), len(squares))
        if self.uniform:
            return most
        if self.tolerance is not None:
            kept = torch.cumsum(squares, 0)
            lost = (norm**2 - kept).clamp_min(0)
            enough = (lost <= (self.tolerance * norm) ** 2 + 1e-14 * norm**2).nonzero()
            return max(1, min(most, int(enough[0]) + 1 if len(enough) else most)) if norm else 1
        top, noise = values.double().amax(), 2 * torch.finfo(torch.float32).eps * math.sqrt(max(sides))
        least = max(noise * float(top), self.noise)
        real = (values.double().reshape(-1, values.shape[-1]).amax(0) > least).sum() if norm else 0
        return max(1, min(most, int(real)))


def truncated_svd(matrix: Tensor, choice: RankChoice) -> tuple[Tensor, Tensor]:
    """Returns factors (g, m, r) and (g, r, n) of matrices (g, m, n), with the singular values' roots in both.

    All singular values of small matrices, and where a tolerance asks for them; else `torch.svd_lowrank`, whose random
    numbers are the same at each call.
    """
    with torch.no_grad():
        wide = _wide(matrix)
        small = min(wide.shape[-2:]) <= _SMALL or choice.rank is None or 4 * choice.rank > min(wide.shape[-2:])
        if small:
            left, values, right = torch.linalg.svd(wide, full_matrices=False)
        else:
            assert choice.rank is not None
            with torch.random.fork_rng():
                torch.manual_seed(0)
                left, values, right = torch.svd_lowrank(wide, q=choice.rank + 16, niter=6)
            right = right.mH
        rank = choice.of(values, float(wide.norm()), (wide.shape[-2], wide.shape[-1]))
        return _split(left, values, right, rank)


def truncated_svd_of_product(B: Tensor, A: Tensor, choice: RankChoice) -> tuple[Tensor, Tensor]:
    """As `truncated_svd` of B @ A, for factors (g, m, r) and (g, r, n), without the product."""
    with torch.no_grad():
        (left, up), (right, down) = (torch.linalg.qr(_wide(side)) for side in (B, A.mH))
        inner_left, values, inner_right = torch.linalg.svd(up @ down.mH, full_matrices=False)
        rank = choice.of(values, float(values.norm()), (B.shape[-2], A.shape[-1]))
        return _split(left @ inner_left, values, inner_right @ right.mH, rank)


def _wide(matrix: Tensor) -> Tensor:
    double = matrix.numel() <= _DOUBLE and has_float64(matrix.device)
    dtype = torch.float64 if double or matrix.dtype == torch.float64 else torch.float32
    return matrix.to(dtype.to_complex() if matrix.is_complex() else dtype)


def _split(left: Tensor, values: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    root = values[..., :rank].sqrt()
    return left[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * right[..., :rank, :]
