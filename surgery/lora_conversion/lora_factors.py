"""LoRA's factors of one weight's change, with the share of the change that they lose."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from surgery.arithmetic.exact_fold import LowRank
from surgery.arithmetic.low_rank import matrix_shape
from surgery.lora_conversion.truncated_svd import RankChoice, truncated_svd, truncated_svd_of_product

__all__ = ["LoraFactors", "factorise"]


@dataclass
class LoraFactors:
    """Factors with the scale 1, the norm of the change, and the norm of what the factors lack."""

    change: LowRank
    norm: float
    lost: float

    @property
    def rank(self) -> int:
        return len(self.change.A)

    @property
    def error(self) -> float:
        """The share of the change's norm that is lost."""
        return self.lost / self.norm if self.norm else 0.0

    def padded(self, rank: int, groups: int) -> LowRank:
        """The factors with zeros up to a rank. `groups`: those of the module, into which no single group may fall."""
        change, own = self.change, self.change.groups
        if own < groups and rank % groups == 0:
            rank += 1
        more = -(-rank // own) - len(change.A) // own
        if more <= 0:
            return change
        A = torch.nn.functional.pad(change.A.unflatten(0, (own, -1)), (0, 0, 0, more)).flatten(0, 1)
        return LowRank(torch.nn.functional.pad(change.B, (0, more)), A, groups=own)


def factorise(
    change: LowRank | Tensor, shape: tuple[int, ...], groups: int, choice: RankChoice, dtype: torch.dtype
) -> LoraFactors:
    """Returns the factors of a change of a weight of this shape, in `dtype`. `groups`: those of a convolution.

    Factors that are known and not longer than the choice asks for stay as they are.
    """
    (m, n) = matrix_shape(shape)
    if isinstance(change, LowRank):
        B, A = _scaled(change)
        own, rank = change.groups, len(change.A)
        fits = own == groups or (own == 1 and rank % groups != 0)
        enough = choice.tolerance is None and rank <= (choice.rank or min(m // own, n) * own)
        if fits and enough:
            return LoraFactors(LowRank(B.to(dtype), A.to(dtype), groups=own), *_norms((B, A), None, own))
        if fits and _by_group(choice, groups, m, n) == own:
            B3, A3 = B.unflatten(0, (own, -1)), A.unflatten(0, (own, -1))
            return _rounded(truncated_svd_of_product(B3, A3, _of_group(choice, own)), (B, A), own, dtype)
        change = (B.unflatten(0, (own, -1)) @ A.unflatten(0, (own, -1))).reshape(shape)
    own = _by_group(choice, groups, m, n)
    matrices = change.reshape(own, m // own, n)
    return _rounded(truncated_svd(matrices, _of_group(choice, own)), matrices, own, dtype)


def _scaled(change: LowRank) -> tuple[Tensor, Tensor]:
    """The factors in float64, with the scale in B."""
    wide = torch.float64 if change.B.device.type != "mps" else torch.float32
    wide = wide.to_complex() if change.B.is_complex() or change.A.is_complex() else wide
    B, A, scale = change.B.detach().to(wide), change.A.detach().to(wide), change.scale
    if not isinstance(scale, Tensor):
        return B * scale, A
    return B, A * scale.to(A.device).reshape(-1, 1)


def _by_group(choice: RankChoice, groups: int, m: int, n: int) -> int:
    """The number of groups of the factors: all groups share factors where a rank can't be divided among them."""
    divided = choice.rank % groups == 0 if choice.rank is not None else min(m, n) >= groups
    return groups if divided else 1


def _of_group(choice: RankChoice, groups: int) -> RankChoice:
    return replace(choice, rank=choice.rank // groups if choice.rank is not None else None)


def _rounded(
    factors: tuple[Tensor, Tensor], exact: Tensor | tuple[Tensor, Tensor], groups: int, dtype: torch.dtype
) -> LoraFactors:
    B, A = (factor.flatten(0, 1).to(dtype) for factor in factors)
    norm, lost = _norms(exact, (B, A), groups)
    return LoraFactors(LowRank(B, A, groups=groups), norm, lost)


def _norms(
    exact: Tensor | tuple[Tensor, Tensor], factors: tuple[Tensor, Tensor] | None, groups: int
) -> tuple[float, float]:
    """The norm of a change, and that of its difference from the product of factors; None: from itself."""
    if isinstance(exact, Tensor):
        norm = float(exact.norm())
        if factors is None:
            return norm, 0.0
        B, A = (factor.to(exact.dtype).unflatten(0, (groups, -1)) for factor in factors)
        return norm, float(torch.baddbmm(exact, B, A, alpha=-1).norm())
    norm = _product_norm(*exact, groups)
    if factors is None:
        return norm, 0.0
    B, A = (factor.to(exact[0].dtype).unflatten(0, (groups, -1)) for factor in factors)
    joined_B = torch.cat([exact[0].unflatten(0, (groups, -1)), -B], 2).flatten(0, 1)
    joined_A = torch.cat([exact[1].unflatten(0, (groups, -1)), A], 1).flatten(0, 1)
    return norm, _product_norm(joined_B, joined_A, groups)


def _product_norm(B: Tensor, A: Tensor, groups: int) -> float:
    """The Frobenius norm of B A, from the triangles of its factors, which are as small as the rank."""
    up = torch.linalg.qr(B.unflatten(0, (groups, -1)), mode="r").R
    down = torch.linalg.qr(A.unflatten(0, (groups, -1)).mH, mode="r").R
    return float((up @ down.mH).norm())
