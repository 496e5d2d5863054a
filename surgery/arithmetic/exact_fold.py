"""The arithmetic of an exact merge: fold a change into a weight in place, and restore the weight's bits later.

Adding ΔW and subtracting it again rounds twice, so a few entries differ. `fold` computes the result of `unfold` in
advance and stores the differences (`corrections.py`). This needs a ΔW that has the same bits each time it is computed
(`low_rank.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from surgery.arithmetic.corrections import INTEGERS, Corrections, Record, checksum
from surgery.arithmetic.low_rank import LowRank, Product, compute_dtype, has_float64, scratch
from surgery.errors import MergeError

__all__ = ["Change", "LowRank", "Record", "Rows", "checksum", "fold", "folded", "refold", "unfold", "weighted"]


@dataclass(frozen=True, eq=False)
class Rows:
    """A change of some rows: weight[index] = values. A fold stores only these rows.

    Attributes:
        index: The row numbers, int64 of shape (k,).
        values: The new rows, of shape (k, …).
    """

    index: Tensor
    values: Tensor


Change = LowRank | Rows | Tensor


def fold(
    weight: Tensor,
    change: Change,
    *,
    keep: Literal["record", "copy"] = "record",
    where: str = "",
    note: Callable[[Record], None] = lambda record: None,
) -> Record:
    """Fold a change into a weight in place. Returns the record with which `unfold` restores the weight.

    >>> weight = torch.randn(64, 32)
    >>> before = weight.clone()
    >>> record = fold(weight, LowRank(torch.randn(64, 4), torch.randn(4, 32)))
    >>> unfold(weight, record)
    >>> torch.equal(weight, before)
    True

    Args:
        weight: The weight. float16, bfloat16 and float32 weights compute in float32 and round once; float64 weights in
            float64, complex weights in complex128.
        change: A LowRank, Rows, or the weight's new value.
        keep: "record" (default) stores corrections for the few entries that arithmetic can't restore, or a copy if
            that is smaller or the weight is complex (see `Record.kind`). "copy" always stores a copy; it is several
            times as fast, and adds an ordinary float32 matmul.
        where: The weight's name in errors.
        note: Called with the record before the weight is written in one step.

    Raises:
        MergeError: Shapes or dtypes do not fit. The weight is unchanged.
    """
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        refuse(weight, change, where)
        if isinstance(change, Rows):
            index = change.index.to(weight.device)
            kept = weight[index].cpu()
            record = Record("rows", weight.shape, weight.dtype, 0, index=index.cpu(), kept=kept)
            note(record)
            weight[index] = change.values.to(weight.device, weight.dtype)
            record.after = checksum(weight)
            return record
        if isinstance(change, Tensor):
            return fold_copy(weight, torch.empty_like(weight).copy_(change), note)
        if weight.is_complex():  # corrections do not support complex arithmetic
            return fold_copy(weight, _complex_value(weight, change), note)
        if weight.numel() and keep == "record":
            if result := _fold_record(_workplace(weight, change), change):
                record, new = result
                note(record)
                weight.copy_(new)
                return record
            return fold_copy(weight, _new_value(weight, change), note)
        return fold_copy(weight, _new_value(weight, change, exact=False), note)


def unfold(weight: Tensor, record: Record, *, check: bool = True, where: str = "", verified: bool = False) -> None:
    """Undo a fold in place, bit for bit.

    Args:
        weight: The weight.
        record: The record of the fold.
        check: Whether to compare the weight's bits with those of the fold. Default True. Without the check, ΔW is
            subtracted from a changed weight (to within rounding), or its stored copy or rows are restored.
        where: The weight's name in errors.
        verified: Whether the caller knows that the bits are those of the fold. Default False.

    Raises:
        MergeError: With `check`, the weight changed since the fold. The weight is not touched.
    """
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        intact = verified or _intact(weight, record, check, where)
        if record.kind == "rows":
            assert record.index is not None and record.kept is not None
            weight[record.index.to(weight.device)] = record.kept.to(weight.device, weight.dtype)
        elif record.kind == "copy":
            _restore_copy(weight, record, where)
        else:
            assert record.change is not None and record.corrections is not None
            work = _workplace(weight, record.change)
            if work is weight:  # the weight is written in one step, after the check
                work = weight.detach().clone(memory_format=torch.contiguous_format)
            _Arithmetic(work, record.change).subtract()
            if intact:
                record.corrections.apply(work)
            if check and checksum(work) != record.before:
                raise MergeError(
                    "the weight did not come back to its original bits",
                    where=where or None,
                    why="this machine rounds differently from the one that merged (denormals flushed to zero?)",
                    fix="load the base weights again, or merge with keep='copy'",
                )
            weight.copy_(work)


def refold(weight: Tensor, record: Record) -> None:
    """Undo an `unfold` of a record with corrections. A weight that still has the bits of the fold stays."""
    assert record.change is not None
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        if checksum(weight) == record.after:
            return
        new = _new_value(_workplace(weight, record.change), record.change)
        if checksum(new) != record.after:
            raise MergeError("the weight did not come back to the bits that the merge wrote")
        weight.copy_(new)


def folded(weight: Tensor, change: Change) -> Tensor:
    """Returns the value that `fold` would write, without changing the weight."""
    with torch.no_grad():
        refuse(weight, change, "")
        if isinstance(change, LowRank):
            return _complex_value(weight, change) if weight.is_complex() else _new_value(weight, change)
        new = weight.detach().clone()
        if isinstance(change, Rows):
            new[change.index.to(new.device)] = change.values.to(new.device, new.dtype)
            return new
        return new.copy_(change)


def weighted(change: Change, tensor: Tensor, weight: float) -> Change:
    """Multiply a change of `tensor` by a number."""
    if isinstance(change, LowRank) and change.gain is None:
        return replace(change, scale=change.scale * weight)
    with torch.no_grad():
        if isinstance(change, Rows):
            old = tensor[change.index.to(tensor.device)]
            return Rows(change.index, _between(old, change.values, weight))
        return _between(tensor, folded(tensor, change) if isinstance(change, LowRank) else change, weight)


def _between(old: Tensor, new: Tensor, weight: float) -> Tensor:
    wide = old.dtype if old.is_complex() else compute_dtype(old.dtype)
    return torch.lerp(old.detach().to(wide), new.to(old.device, wide), weight).to(old.dtype)


class _Arithmetic:
    """The arithmetic of fold and unfold with its rounding, one tile at a time."""

    def __init__(self, weight: Tensor, change: LowRank, exact: bool = True):
        self.product = Product(change, weight.shape, weight.dtype, weight.device, exact)
        self.weight = weight.detach()
        if self.product.height != len(weight):  # a stack of matrices
            self.weight = self.weight.flatten(0, 1)
        self.gain, self.inverse = change.gains(self.weight)

    def tiles(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yields the first and last row, the rows as a matrix (a view if the layout allows), and their ΔW."""
        for i, j in self.product.tiles():
            delta = self.product(i, j)
            yield i, j, self.weight[i:j].reshape(delta.shape), delta

    def add(self, i: int, j: int, rows: Tensor, delta: Tensor) -> Tensor:
        """Returns gain ⊙ (rows + ΔW) in the compute dtype."""
        size = (j - i, self.product.width)
        total = torch.add(rows, delta, out=scratch("folded", size, delta.dtype, delta.device))
        return total if self.gain is None else total.mul_(self.gain[i:j].reshape(delta.shape))

    def undo(self, i: int, j: int, rows: Tensor, delta: Tensor) -> Tensor:
        """Returns rows / gain - ΔW in the compute dtype, in the memory of ΔW."""
        if self.inverse is not None:
            rows = rows * self.inverse[i:j].reshape(delta.shape)
        return torch.sub(rows, delta, out=delta)

    def write(self, i: int, j: int, rows: Tensor) -> None:
        target = self.weight[i:j]
        target.copy_(rows.view(target.shape))

    def subtract(self) -> None:
        for i, j, rows, delta in self.tiles():
            self.write(i, j, self.undo(i, j, rows, delta))


def _fold_record(weight: Tensor, change: LowRank) -> tuple[Record, Tensor] | None:
    """Returns the record with corrections and the new value, or None if they need more memory than a copy."""
    change = change.snapshot()
    budget = weight.numel() * weight.element_size() - change.nbytes
    work = _Arithmetic(weight, change)
    if budget <= 0 or not work.product.exact:
        return None
    integers, width = INTEGERS[weight.element_size()], work.product.width
    before, corrections = checksum(weight), Corrections()
    result = torch.empty_like(work.weight, memory_format=torch.contiguous_format)
    for i, j, old, delta in work.tiles():
        new = work.add(i, j, old, delta).to(old.dtype)
        back = work.undo(i, j, new, delta)
        want, got = old.view(integers), back.to(old.dtype).view(integers)
        if math.isnan(float(back.sum())):
            nan = back.isnan()
            corrections.add_nan(i * width, nan.flatten().nonzero().squeeze(1), want[nan])
            got[nan] = want[nan]
        corrections.add(i * width, want.flatten(), got.flatten())
        result[i:j].copy_(new.view(result[i:j].shape))
        if corrections.nbytes > budget:
            return None
    corrections.close()
    if corrections.nbytes > budget:
        return None
    result = result.view(weight.shape)
    return Record("record", weight.shape, weight.dtype, checksum(result), before, change, corrections), result


def _new_value(weight: Tensor, change: LowRank, exact: bool = True) -> Tensor:
    source, new = weight.detach(), torch.empty_like(weight)
    work = _Arithmetic(source, change, exact)
    product = work.product
    plain = work.gain is None and change.groups == 1 and source.dtype == product.compute and source.is_contiguous()
    if plain and not exact:
        # One pass over memory; `out=` disables autocast.
        size = (product.height, product.width)
        torch.addmm(source.view(size), product.B[0][0], product.A[0][0], out=new.view(size))
        return new
    rows_of_new = new
    if product.height != len(new):  # a stack of matrices
        rows_of_new = torch.empty_like(work.weight, memory_format=torch.contiguous_format)
    for i, j, rows, delta in work.tiles():
        rows_of_new[i:j].copy_(work.add(i, j, rows, delta).view(rows_of_new[i:j].shape))
    return new if rows_of_new is new else rows_of_new.view(weight.shape)  # a view forgets the strides of single rows


def _complex_value(weight: Tensor, change: LowRank) -> Tensor:
    """Returns gain ⊙ (W + ΔW) in complex128, rounded once."""
    total = weight.detach().to(torch.complex128) + change.complex_delta(weight.shape, weight.device)
    if change.gain is not None:
        gain = change.gain.detach().to(weight.device, total.dtype)
        by_row = gain.dim() == 1 and len(gain) == len(weight)
        total = total * (gain.view(-1, *[1] * (weight.dim() - 1)) if by_row else gain)
    return torch.empty_like(weight).copy_(total)


def fold_copy(weight: Tensor, new: Tensor, note: Callable[[Record], None]) -> Record:
    record = Record("copy", weight.shape, weight.dtype, checksum(new))
    if _owns_storage(weight):
        record.kept, record.swapped_for = weight.data, new.data_ptr()
        note(record)
        weight.data = new
    else:
        record.kept = weight.detach().clone()
        note(record)
        weight.copy_(new)
    return record


def _restore_copy(weight: Tensor, record: Record, where: str) -> None:
    kept = record.kept
    if kept is None:
        raise MergeError("this merge is already undone", where=where or None, why="its record was used before")
    # Only exchanged memory is exchanged back, so a clone of the weight does not use up the record.
    if record.swapped_for == weight.data_ptr() and kept.device == weight.device and _owns_storage(weight):
        weight.data, record.kept = kept, None
    else:
        weight.copy_(kept)


def _owns_storage(weight: Tensor) -> bool:
    """Whether only `weight` uses its memory, so that the memory can be exchanged."""
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.is_shared():
        return False
    storage = weight.untyped_storage()
    # torch has only a private count of a storage's users: here the weight and the handle of this function.
    holders = getattr(torch._C, "_storage_Use_Count", lambda _: 3)(storage._cdata)
    return holders == 2 and weight.numel() * weight.element_size() == storage.nbytes()


def _workplace(weight: Tensor, change: LowRank) -> Tensor:
    """Returns the weight, or a copy if the arithmetic can't run in its memory."""
    if not has_float64(weight.device):
        weight = weight.detach().cpu()
    if change.seen(weight.shape) == tuple(weight.shape) or weight.stride(0) == weight.shape[1] * weight.stride(1):
        return weight
    return weight.detach().contiguous()  # a stack with uneven row strides


def _intact(weight: Tensor, record: Record, check: bool, where: str) -> bool:
    same = weight.dtype == record.dtype and weight.shape == record.shape and checksum(weight) == record.after
    if weight.shape != record.shape or (check and not same):
        now, then = (f"{t.dtype} {tuple(t.shape)}" for t in (weight, record))
        raise MergeError(
            "the weight was changed while it was merged",
            where=where or None,
            why="its bits are not the bits that the merge wrote (training, loading, editing)"
            if now == then
            else f"it is {now} and was {then}",
            fix="unmerge(model, check=False) removes the change to within rounding; or load the base weights again",
        )
    return same


def refuse(weight: Tensor, change: Change, where: str) -> None:
    def error(why: str) -> MergeError:
        return MergeError("the change can't be folded into the weight", where=where or None, why=why)

    if weight.is_meta or weight.layout != torch.strided:
        raise error("the weight is a meta or sparse tensor, which can't be written in place")
    if isinstance(change, LowRank):
        if weight.dtype not in _FOLDABLE:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FOLDABLE)
            raise error(f"the weight is {weight.dtype}: low-rank changes need one of {names}")
        change.check(weight.shape, where)
        if not weight.is_complex() and (change.B.is_complex() or change.A.is_complex()):
            raise error("its factors are complex, but the weight is real")
    elif isinstance(change, Rows):
        index, m = change.index, weight.shape[0] if weight.dim() else 0
        if index.dim() != 1 or change.values.shape != (len(index), *weight.shape[1:]):
            raise error(f"rows {tuple(index.shape)} with values {tuple(change.values.shape)} for {tuple(weight.shape)}")
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= m or len(index.unique()) < len(index)):
            raise error(f"row numbers must be distinct and in 0 … {m - 1}")
    elif change.shape != weight.shape:
        raise error(f"the weight is {tuple(weight.shape)}, its new value {tuple(change.shape)}")


_FOLDABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
