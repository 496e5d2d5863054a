"""Ways to round a merged weight to half precision, and how much of a change the rounding swallows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surgery.errors import MergeError

__all__ = ["HALF", "Loss", "Rounding", "RoundingMode", "feedback_factor", "round_with_feedback"]

RoundingMode = Literal["nearest", "stochastic", "error-feedback"]
HALF = (torch.float16, torch.bfloat16)
_MANY = 1 << 16  # entries
_BLOCK = 64  # columns that are rounded before their errors move on to all later columns


class Loss:
    """Sums the squares of ΔW, and of what the rounding of W + ΔW changed, over the tiles of one weight."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, old: Tensor, total: Tensor, new: Tensor, delta: Tensor | None = None, weight: int = 1) -> None:
        """Count some rows: their values before, the sum in the compute dtype, and its value in the weight's dtype.

        `delta`: total - old, if it is known. `weight`: how many rows each of these stands for. Of many entries, every
        fourth row counts for four: an estimate to within about 1 %.
        """
        if not new.numel():
            return
        if new.numel() >= _MANY and len(new) >= 16 and weight == 1:
            weight, (old, total, new) = 4, (rows[::4] for rows in (old, total, new))
            delta = delta if delta is None else delta[::4]
        if delta is None:
            delta = total - old
        # A sum in the weight's own dtype is rounded already: its error is (new - old) - ΔW.
        error = (new - old).sub_(delta) if new.dtype == total.dtype else total - new
        self._parts.append(weight * torch.stack((_square(delta), _square(error))))

    @property
    def norms(self) -> tuple[float, float]:
        """‖ΔW‖ and the norm of what was lost."""
        change, error = torch.stack(self._parts).double().sum(0).tolist() if self._parts else (0.0, 0.0)
        return math.sqrt(change) if change >= 0 else math.nan, math.sqrt(error) if error >= 0 else math.nan


def _square(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return torch.vdot(flat, flat).real if flat.is_complex() else torch.dot(flat, flat)


@dataclass(frozen=True, eq=False)
class Rounding:
    """A way to round sums to half precision other than to the nearest number.

    Attributes:
        mode: "stochastic" or "error-feedback".
        generator: draws the numbers of "stochastic". None: torch's own generator.
        factor: for "error-feedback", the result of `feedback_factor` of the inputs. None: inputs with equal features.
        transposed: whether the weight is (in, out), so errors move down the columns.
    """

    mode: RoundingMode
    generator: torch.Generator | None = None
    factor: Tensor | None = None
    transposed: bool = False

    def applies(self, weight: Tensor) -> bool:
        return weight.dtype in HALF

    def rows(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """Rounds each number up or down, with the probability of its distance, so the mean error is zero."""
        nearest = total.to(dtype)
        error = total - nearest.float()
        other = _next_towards(nearest, error)
        gap = (other.float() - nearest.float()).abs()
        home = self.generator.device if self.generator is not None else torch.device("cpu")
        draw = torch.rand(total.shape, generator=self.generator, device=home).to(total.device)
        moves = (error != 0) & gap.isfinite() & (draw * gap < error.abs())
        return torch.where(moves, other, nearest)

    def whole(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """Rounds a matrix so that the error of an entry is taken out of the entries after it."""
        factor = self.factor if self.factor is None or len(self.factor) == total.shape[not self.transposed] else None
        if self.transposed:
            return round_with_feedback(total.t(), lambda column, _: column.to(dtype).float(), factor).t().to(dtype)
        return round_with_feedback(total, lambda column, _: column.to(dtype).float(), factor).to(dtype)

    def value(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """Rounds a tensor of any shape."""
        if self.mode == "stochastic":
            return self.rows(total.float(), dtype)
        return self.whole(total.float().flatten(1), dtype).view(total.shape) if total.dim() > 1 else total.to(dtype)


def _next_towards(number: Tensor, direction: Tensor) -> Tensor:
    """The neighbour of each half-precision number in the direction of the sign of `direction`."""
    bits = number.view(torch.int16)
    away = (number >= 0) == (direction > 0)  # from zero
    moved = (bits + torch.where(away, 1, -1).to(torch.int16)).view(number.dtype)
    smallest = torch.ones_like(bits).view(number.dtype)
    return torch.where(number == 0, torch.where(direction > 0, smallest, -smallest), moved)


def feedback_factor(products: Tensor) -> Tensor:
    """Returns the factor U of GPTQ for H = XᵀX: the upper Cholesky factor of the inverse of H + 1 % of its mean.

    Raises:
        MergeError: H is not finite.
    """
    size = len(products)
    H = products.double().cpu()
    if not H.isfinite().all():
        raise MergeError("the inputs of error feedback are not finite", fix="use other example_inputs")
    mean = H.diagonal().mean().item() or 1.0
    H = H + 0.01 * mean * torch.eye(size, dtype=H.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    return torch.linalg.cholesky(inverse, upper=True).to(products.device, torch.float32)


def round_with_feedback(total: Tensor, quantise: Callable[[Tensor, int], Tensor], factor: Tensor | None) -> Tensor:
    """Rounds a matrix column by column; the error of a column is taken out of the columns after it (Frantar 2022).

    Args:
        total: the exact matrix (out, in), in float32.
        quantise: rounds the numbers of a column; gets them and the number of the column.
        factor: the result of `feedback_factor`. None: inputs whose features are equal, so the error of a row is carried
            as it is, and the sum of each row stays.

    Returns:
        The rounded matrix, in float32.
    """
    columns = total.t().contiguous()  # a column is a row here, which is fast to read
    rounded, width = torch.empty_like(columns), len(columns)
    if factor is None:
        carry = columns.new_zeros(columns.shape[1:])
        for j in range(width):
            wanted = columns[j] + carry
            rounded[j] = quantise(wanted, j)
            # A sum that overflows has no error to carry.
            carry = torch.nan_to_num(wanted.sub_(rounded[j]), nan=0.0, posinf=0.0, neginf=0.0)
        return rounded.t()
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        errors = torch.empty_like(columns[start:end])
        for j in range(start, end):
            rounded[j] = quantise(columns[j], j)
            errors[j - start] = (columns[j] - rounded[j]).div_(factor[j, j])
            if j + 1 < end:
                columns[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j - start], alpha=-1)
        if end < width:
            columns[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return rounded.t()
