"""Records that keep the whole old value of a weight. If possible, memory is exchanged instead of copied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from surgery.arithmetic.corrections import Record, checksum
from surgery.errors import MergeError

__all__ = ["fold_copy", "restore_copy"]


def fold_copy(
    weight: Tensor, new: Tensor, note: Callable[[Record], None], norms: tuple[float | None, float | None] = (None, None)
) -> Record:
    """Write a new value into a weight. The record keeps the whole old value."""
    record = Record("copy", weight.shape, weight.dtype, checksum(new), norm=norms[0], error=norms[1])
    if _owns_storage(weight):
        record.kept, record.swapped_for = weight.data, new.data_ptr()
        note(record)
        weight.data = new
    else:
        record.kept = weight.detach().clone()
        note(record)
        weight.copy_(new)
    return record


def restore_copy(weight: Tensor, record: Record, where: str) -> None:
    """Write the old value back into a weight. Raises `MergeError` if the record was used before."""
    copy = record.kept
    if copy is None:
        raise MergeError("this merge is already undone", where=where or None, why="its record was used before")
    # Only exchanged memory is exchanged back, so a clone of the weight does not use up the record.
    if record.swapped_for == weight.data_ptr() and copy.device == weight.device and _owns_storage(weight):
        weight.data, record.kept = copy, None
    else:
        weight.copy_(copy)


def _owns_storage(weight: Tensor) -> bool:
    """Whether only `weight` uses its memory, so that the memory can be exchanged."""
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.is_shared():
        return False
    storage = weight.untyped_storage()
    # torch has only a private count of a storage's users: here the weight and the handle of this function.
    holders = getattr(torch._C, "_storage_Use_Count", lambda _: 3)(storage._cdata)
    return holders == 2 and weight.numel() * weight.element_size() == storage.nbytes()
