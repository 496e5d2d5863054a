"""The arithmetic of fold and unfold: new values of a weight, and corrections for bits that it does not restore."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from surgery.arithmetic.corrections import INTEGERS, Corrections, Record, checksum
from surgery.arithmetic.low_rank import LowRank, Product, has_float64, scratch
from surgery.arithmetic.rounding import Loss, Rounding

__all__ = ["FoldArithmetic", "add_in_place", "complex_value", "fold_record", "new_value", "working_copy"]


class FoldArithmetic:
    """The arithmetic of fold and unfold with its rounding, one tile at a time."""

    def __init__(self, weight: Tensor, change: LowRank, exact: bool = True):
        self.product = Product(change, weight.shape, weight.dtype, weight.device, exact)
        self.weight = weight.detach()
        if self.product.height != len(weight):  # a stack of matrices
            self.weight = self.weight.flatten(0, 1)
        self.gain, self.inverse = change.gains(self.weight)
        size = self.product.height, self.product.width
        self.matrix = self.weight.view(size) if self.weight.is_contiguous() else None
        self._total: Tensor | None = None  # memory of the last sum

    def tiles(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yields the first and last row, the rows as a matrix (a view if the layout allows), and their ΔW."""
        for i, j in self.product.tiles():
            delta = self.product(i, j)
            yield i, j, self.weight[i:j].reshape(delta.shape) if self.matrix is None else self.matrix[i:j], delta

    def add(self, i: int, j: int, rows: Tensor, delta: Tensor) -> Tensor:
        """Returns gain ⊙ (rows + ΔW) in the compute dtype."""
        total = self._total
        if total is None or total.shape != delta.shape:
            total = scratch("folded", (j - i, self.product.width), delta.dtype, delta.device)
            self._total = total if total.device.type == "cpu" else None
        if rows.dtype == total.dtype:
            torch.add(rows, delta, out=total)
        else:
            total.copy_(rows).add_(delta)  # `torch.add` would widen the rows into memory of its own
        return total if self.gain is None else total.mul_(self.gain[i:j].reshape(delta.shape))

    def undo(self, i: int, j: int, rows: Tensor, delta: Tensor) -> Tensor:
        """Returns rows / gain - ΔW in the compute dtype, in the memory of ΔW."""
        if self.inverse is not None:
            rows = rows * self.inverse[i:j].reshape(delta.shape)
        return torch.sub(rows, delta, out=delta)

    def write(self, i: int, j: int, rows: Tensor) -> None:
        target = self.weight[i:j] if self.matrix is None else self.matrix[i:j]
        target.copy_(rows if self.matrix is not None else rows.view(target.shape))

    def rounded(self, rounding: Rounding | None) -> Callable[[int, int, Tensor], Tensor]:
        """Returns a function that rounds rows i to j of the sum to the dtype of the weight."""
        dtype = self.weight.dtype
        if rounding is None or not rounding.applies(self.weight):
            return lambda i, j, total: total.to(dtype)
        if rounding.mode == "stochastic":
            return lambda i, j, total: rounding.rows(total, dtype)
        whole = torch.empty(
            self.product.height, self.product.width, dtype=self.product.compute, device=self.weight.device
        )
        for i, j, rows, delta in self.tiles():
            whole[i:j] = self.add(i, j, rows, delta)
        whole = rounding.whole(whole, dtype)
        return lambda i, j, total: whole[i:j]

    def add_all(self) -> None:
        for i, j, rows, delta in self.tiles():
            self.write(i, j, self.add(i, j, rows, delta))

    def subtract(self) -> None:
        for i, j, rows, delta in self.tiles():
            self.write(i, j, self.undo(i, j, rows, delta))


def fold_record(weight: Tensor, change: LowRank, rounding: Rounding | None = None) -> tuple[Record, Tensor] | None:
    """Returns the record with corrections and the new value, or None if they need more memory than a copy."""
    change = change.snapshot()
    budget = weight.numel() * weight.element_size() - change.nbytes
    work = FoldArithmetic(weight, change)
    if budget <= 0 or not work.product.exact:
        return None
    integers, width = INTEGERS[weight.element_size()], work.product.width
    before, corrections = checksum(weight), Corrections()
    result = torch.empty_like(work.weight, memory_format=torch.contiguous_format)
    rounded, loss = work.rounded(rounding), Loss()
    for i, j, old, delta in work.tiles():
        total = work.add(i, j, old, delta)
        new = rounded(i, j, total)
        loss.add(old, total, new, delta if work.gain is None else None)
        back = work.undo(i, j, new, delta)
        wanted_bits, got_bits = old.view(integers), back.to(old.dtype).view(integers)
        if math.isnan(float(back.sum())):
            nan = back.isnan()
            corrections.add_nan(i * width, nan.flatten().nonzero().squeeze(1), wanted_bits[nan])
            got_bits[nan] = wanted_bits[nan]
        corrections.add(i * width, wanted_bits.flatten(), got_bits.flatten())
        result[i:j].copy_(new.view(result[i:j].shape))
        if corrections.nbytes > budget:
            return None
    corrections.close()
    if corrections.nbytes > budget:
        return None
    result = result.view(weight.shape)
    record = Record("record", weight.shape, weight.dtype, checksum(result), before, change, corrections)
    record.norm, record.error = loss.norms
    record.nearest = rounding is None
    return record, result


def new_value(
    weight: Tensor, change: LowRank, exact: bool = True, rounding: Rounding | None = None, loss: Loss | None = None
) -> Tensor:
    """Returns gain ⊙ (W + ΔW), rounded once. `loss`: sums what the rounding loses."""
    source, new = weight.detach(), torch.empty_like(weight)
    work = FoldArithmetic(source, change, exact)
    product = work.product
    plain = work.gain is None and change.groups == 1 and source.dtype == product.compute and source.is_contiguous()
    if plain and not exact:
        # One pass over memory; `out=` disables autocast.
        size = (product.height, product.width)
        torch.addmm(source.view(size), product.B[0][0], product.A[0][0], out=new.view(size))
        if loss is not None:  # every 16th row is enough for an estimate, and costs little
            step = 16 if len(new) >= 256 else 1
            old, rows, delta = (
                source.view(size)[::step],
                new.view(size)[::step],
                product.B[0][0][::step] @ product.A[0][0],
            )
            loss.add(old, rows, rows, product.B[0][0][::step] @ product.A[0][0], weight=step)
        return new
    rows_of_new = new
    if product.height != len(new):  # a stack of matrices
        rows_of_new = torch.empty_like(work.weight, memory_format=torch.contiguous_format)
    rounded = work.rounded(rounding)
    for i, j, rows, delta in work.tiles():
        total = work.add(i, j, rows, delta)
        value = rounded(i, j, total)
        rows_of_new[i:j].copy_(value.view(rows_of_new[i:j].shape))
        if loss is not None:
            loss.add(rows, total, value, delta if work.gain is None else None)
    return new if rows_of_new is new else rows_of_new.view(weight.shape)  # a view forgets the strides of single rows


def add_in_place(weight: Tensor, change: LowRank) -> None:
    """Writes what `new_value` returns into a weight, which is contiguous and real. Needs the memory of one tile."""
    FoldArithmetic(weight, change).add_all()


def complex_value(weight: Tensor, change: LowRank) -> Tensor:
    """Returns gain ⊙ (W + ΔW) in complex128, rounded once."""
    total = weight.detach().to(torch.complex128) + change.complex_delta(weight.shape, weight.device)
    if change.gain is not None:
        gain = change.gain.detach().to(weight.device, total.dtype)
        by_row = gain.dim() == 1 and len(gain) == len(weight)
        total = total * (gain.view(-1, *[1] * (weight.dim() - 1)) if by_row else gain)
    return torch.empty_like(weight).copy_(total)


def working_copy(weight: Tensor, change: LowRank) -> Tensor:
    """Returns the weight, or a copy if the arithmetic can't run in its memory."""
    if not has_float64(weight.device):
        weight = weight.detach().cpu()
    if change.viewed_shape(weight.shape) == tuple(weight.shape) or weight.stride(0) == weight.shape[1] * weight.stride(
        1
    ):
        return weight
    return weight.detach().contiguous()  # a stack with uneven row strides
