"""Chooses codes and scales for new values of a packed weight: refitted scales, and error feedback on inputs (GPTQ)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.arithmetic.rounding import feedback_factor, round_with_feedback
from surgery.packed.packed_tensors import PackedTensors

__all__ = ["Codes", "choose_codes"]

_SAMPLE = 1 << 17  # entries from which the levels of a grid are read
_STEPS = 2  # of refitting scales to codes and codes to scales


@dataclass(frozen=True, eq=False)
class Codes:
    """Codes and scales of a packed weight, and what they are worth.

    Attributes:
        tensors: the stored tensors, for `PackedWeight.write`.
        values: the dequantised weight, in float32.
        error: the norm of its distance from the wanted weight, in outputs if there are inputs.
    """

    tensors: dict[str, Tensor]
    values: Tensor
    error: float


def choose_codes(packed: PackedTensors, wanted: Tensor, products: Tensor | None = None) -> Codes:
    """Returns the codes of least error among several ways to quantise. The module then has codes of one of them.

    Args:
        packed: the packed weight. The caller writes the old tensors, or the returned ones.
        wanted: the weight to reach, (out, in), in float32; for a stack, (experts, …).
        products: H = XᵀX of the inputs X. With it, the error is that of the outputs, tr(E H Eᵀ), and rounding errors of
            a column are taken out of the columns after it, as GPTQ does. Default None: the error is ‖E‖.
    """
    fits = products is not None and len(products) == wanted.shape[1]
    H = products.to(wanted.device) if products is not None and fits else None

    def codes(values: Tensor, scales: str) -> Codes:
        tensors = packed.requantise(values, scales=scales)  # type: ignore[arg-type]
        packed.write(tensors)
        got = packed.dequantise().float()
        error = got - wanted
        square = (error @ H * error).sum() if H is not None else error.square().sum()
        return Codes(tensors, got, float(square.clamp(min=0).sqrt()))

    kept = codes(wanted, "keep")  # the base's values are on this grid
    tried = [kept, refitted := codes(wanted, "refit")]
    for _ in range(_STEPS if wanted.dim() == 2 else 0):
        scaled = _least_squares(refitted.values, wanted)
        codes(scaled, "refit")  # the scales of the best multiple of each group
        tried.append(refitted := codes(wanted, "keep"))
    if H is not None:
        factor = feedback_factor(H)
        for start in {id(found): found for found in (min(tried, key=lambda found: found.error), kept)}.values():
            packed.write(start.tensors)
            grid = _Grid.of(packed, wanted)
            tried.append(codes(round_with_feedback(wanted, grid.nearest, factor), "keep"))
    best = min(tried, key=lambda found: found.error)
    packed.write(best.tensors)
    return best


def _least_squares(values: Tensor, wanted: Tensor) -> Tensor:
    """The values with each run of 32 columns multiplied by the number that brings it nearest to the wanted ones.

    Blocks of all backends are multiples of 32 or whole rows; a scale that several runs share gets the largest multiple.
    """
    rows, columns = values.shape
    width = 32 if columns % 32 == 0 else columns
    v, w = values.reshape(rows, -1, width), wanted.reshape(rows, -1, width)
    square = v.square().sum(-1, keepdim=True)
    factor = torch.where(square > 0, (v * w).sum(-1, keepdim=True) / square, 1.0).clamp(0.5, 2.0)
    return (v * factor).reshape(rows, columns)


@dataclass(frozen=True, eq=False)
class _Grid:
    """The values that each entry can take with the scales that are there: low + (high - low) · level."""

    low: Tensor
    span: Tensor
    levels: Tensor

    @staticmethod
    def of(packed: PackedTensors, wanted: Tensor) -> _Grid:
        """Reads the grid from the backend: the largest and smallest values, and those between."""

        def rounded(values: Tensor) -> Tensor:
            packed.write(packed.requantise(values, scales="keep"))
            return packed.dequantise().float()

        large = torch.full_like(wanted, min(6e4, 100 * float(wanted.abs().max()) + 1))
        low, high = rounded(-large), rounded(large)
        span = high - low
        draw = torch.rand(wanted.shape, generator=torch.Generator().manual_seed(0)).to(wanted.device)
        between = ((rounded(low + span * draw) - low) / span)[span > 0]
        between = between[:: max(1, len(between) // _SAMPLE)].sort().values
        if not len(between):
            return _Grid(low, span, wanted.new_zeros(1))
        first = torch.ones_like(between, dtype=torch.bool)
        first[1:] = between.diff() > 1 / 1024  # numbers that are nearer are one level, rounded
        group = first.cumsum(0) - 1
        count = int(group[-1]) + 1
        sums = torch.zeros(count, device=between.device).index_add_(0, group, between)
        return _Grid(low, span, sums / torch.bincount(group, minlength=count))

    def nearest(self, numbers: Tensor, column: int) -> Tensor:
        low, span = self.low[:, column], self.span[:, column]
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        share = torch.where(span > 0, (numbers - low) / span, 0.0)
        return low + span * self.levels[torch.bucketize(share, middles)]
