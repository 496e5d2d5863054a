"""The arithmetic of an exact merge: fold a change into a weight in place, and restore the weight's bits later.

Adding ΔW and subtracting it again rounds twice, so a few entries differ. `fold` computes the result of `unfold` in
advance and stores the differences (`corrections.py`). This needs a ΔW that has the same bits each time it is computed
(`low_rank.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from surgery.arithmetic.corrections import Record, checksum
from surgery.arithmetic.fold_arithmetic import (
    FoldArithmetic,
    add_in_place,
    complex_value,
    fold_record,
    new_value,
    working_copy,
)
from surgery.arithmetic.low_rank import LowRank, compute_dtype
from surgery.arithmetic.rounding import Loss, Rounding
from surgery.arithmetic.weight_copies import fold_copy, restore_copy
from surgery.errors import MergeError

__all__ = [
    "Change",
    "LowRank",
    "Record",
    "Rows",
    "checksum",
    "fold",
    "fold_for_good",
    "folded_value",
    "refold",
    "scale_change",
    "unfold",
]


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
    rounding: Rounding | None = None,
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
        rounding: How sums are rounded to float16 and bfloat16. Default None: to the nearest number.

    Raises:
        MergeError: Shapes or dtypes do not fit. The weight is unchanged.
    """
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        check_foldable(weight, change, where)
        if isinstance(change, Rows):
            index = change.index.to(weight.device)
            old_rows, (new_rows, norms) = weight[index], _rounded(weight[index], change.values, rounding)
            record = Record("rows", weight.shape, weight.dtype, 0, index=index.cpu(), kept=old_rows.cpu())
            record.norm, record.error = norms
            note(record)
            weight[index] = new_rows
            record.after = checksum(weight)
            return record
        if isinstance(change, Tensor):
            new, norms = _rounded(weight, change, rounding)
            return fold_copy(weight, torch.empty_like(weight).copy_(new), note, norms)
        if weight.is_complex():  # corrections do not support complex arithmetic
            return fold_copy(weight, complex_value(weight, change), note)
        if weight.numel() and keep == "record":
            if result := fold_record(working_copy(weight, change), change, rounding):
                record, new = result
                note(record)
                weight.copy_(new)
                return record
        new = new_value(weight, change, keep == "record", rounding, loss := Loss())
        return fold_copy(weight, new, note, loss.norms)


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
            restore_copy(weight, record, where)
        else:
            assert record.change is not None and record.corrections is not None
            work = working_copy(weight, record.change)
            if work is weight:  # the weight is written in one step, after the check
                work = weight.detach().clone(memory_format=torch.contiguous_format)
            FoldArithmetic(work, record.change).subtract()
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
        new = new_value(working_copy(weight, record.change), record.change)
        if checksum(new) != record.after:
            raise MergeError("the weight did not come back to the bits that the merge wrote")
        weight.copy_(new)


def folded_value(weight: Tensor, change: Change, rounding: Rounding | None = None) -> Tensor:
    """Returns the value that `fold` would write, without changing the weight."""
    with torch.no_grad():
        check_foldable(weight, change, "")
        if isinstance(change, LowRank):
            return (
                complex_value(weight, change) if weight.is_complex() else new_value(weight, change, rounding=rounding)
            )
        new = weight.detach().clone()
        if isinstance(change, Rows):
            index = change.index.to(new.device)
            new[index] = _rounded(new[index], change.values, rounding)[0]
            return new
        return new.copy_(_rounded(new, change, rounding)[0])


def fold_for_good(weight: Tensor, change: Change, where: str = "") -> Tensor:
    """Returns the value that `fold` would write, and keeps no record. The weight's memory may be used for it."""
    with torch.no_grad():
        check_foldable(weight, change, where)
        if isinstance(change, LowRank) and not weight.is_complex() and weight.is_contiguous():
            add_in_place(weight, change)
            return weight
        return folded_value(weight, change)


def scale_change(change: Change, tensor: Tensor, weight: float) -> Change:
    """Multiply a change of `tensor` by a number."""
    if isinstance(change, LowRank) and change.gain is None:
        return replace(change, scale=change.scale * weight)
    with torch.no_grad():
        if isinstance(change, Rows):
            old = tensor[change.index.to(tensor.device)]
            return Rows(change.index, _interpolate(old, change.values, weight))
        return _interpolate(tensor, folded_value(tensor, change) if isinstance(change, LowRank) else change, weight)


def _interpolate(old: Tensor, new: Tensor, weight: float) -> Tensor:
    """The interpolated value in the compute dtype; a fold rounds it."""
    wide = old.dtype if old.is_complex() else compute_dtype(old.dtype)
    return torch.lerp(old.detach().to(wide), new.to(old.device, wide), weight)


def _rounded(old: Tensor, value: Tensor, rounding: Rounding | None) -> tuple[Tensor, tuple[float, float | None]]:
    """A new value in the dtype of the old one, ‖ΔW‖, and the norm of what the dtype lost (None: unknown)."""
    value = value.detach().to(old.device)
    wide = value.is_floating_point() and old.is_floating_point() and value.dtype.itemsize > old.dtype.itemsize
    if not wide:
        new = value.to(old.dtype)
        compute = torch.complex128 if old.is_complex() else compute_dtype(old.dtype)
        return new, (float((new.to(compute) - old.to(compute)).norm()), None)
    applies = rounding is not None and rounding.applies(old)
    new = rounding.value(value, old.dtype) if rounding is not None and applies else value.to(old.dtype)
    loss = Loss()
    loss.add(old, value, new)
    return new, loss.norms


def _intact(weight: Tensor, record: Record, check: bool, where: str) -> bool:
    """Whether a weight still has the bits of the fold. With `check`, raises `MergeError` if it does not."""
    same = weight.dtype == record.dtype and weight.shape == record.shape and checksum(weight) == record.after
    if weight.shape != record.shape or (check and not same):
        present, recorded = (f"{t.dtype} {tuple(t.shape)}" for t in (weight, record))
        raise MergeError(
            "the weight was changed while it was merged",
            where=where or None,
            why="its bits are not the bits that the merge wrote (training, loading, editing)"
            if present == recorded
            else f"it is {present} and was {recorded}",
            fix="unmerge(model, check=False) removes the change to within rounding; or load the base weights again",
        )
    return same


def check_foldable(weight: Tensor, change: Change, where: str) -> None:
    """Raise `MergeError` if a change does not fit a weight, or the weight can't be written in place."""

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
