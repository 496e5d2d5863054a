"""Folds of many small weights at once: the same bits as one by one, in a fraction of the calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from surgery._lowrank import LowRank, exact_parts, matrix_shape
from surgery._record import INTEGERS, Corrections, Record, checksums, nonzero
from surgery.exact import fold, fold_copy, refuse

__all__ = ["Fold", "fold_all"]

SMALL = 1 << 14  # entries; a larger weight's own arithmetic takes longer than the calls for it
_TOGETHER = 1 << 17  # entries of a stack: what is made of it should stay in cache
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Fold(NamedTuple):
    """A low-rank change of a weight, its name in errors, and what gets the record before the weight is written."""

    weight: Tensor
    change: LowRank
    where: str
    note: Callable[[Record], None] = lambda record: None


def fold_all(folds: Sequence[Fold]) -> list[Record]:
    """`exact.fold(…, keep="record")` of each."""
    records: list[Record | None] = [None] * len(folds)
    alike, places = dict[tuple, list[int]](), set[int]()
    for index, one in enumerate(folds):
        refuse(one.weight, one.change, one.where)
        if _small(one) and one.weight.data_ptr() not in places:  # what shares memory is folded in turn
            places.add(one.weight.data_ptr())
            factors = (one.change.B.dtype, one.change.A.dtype, len(one.change.A), one.change.scale)
            alike.setdefault((one.weight.shape, one.weight.dtype, *factors), []).append(index)
    for indices in alike.values():
        most = max(1, _TOGETHER // folds[indices[0]].weight.numel())
        for start in range(0, len(indices), most):
            some = indices[start : start + most]
            if len(some) > 1:
                for index, record in zip(some, _together([folds[index] for index in some]), strict=True):
                    records[index] = record
    return [
        record if record is not None else fold(one.weight, one.change, where=one.where, note=one.note)
        for one, record in zip(folds, records, strict=True)
    ]


def _small(one: Fold) -> bool:
    weight, change = one.weight, one.change
    plain = change.groups == 1 and change.gain is None and type(change.scale) in (int, float)
    here = all(tensor.device.type == "cpu" for tensor in (weight, change.A, change.B))
    fits = weight.dtype in _DTYPES and 0 < weight.numel() <= SMALL and weight.is_contiguous()
    return plain and here and fits and not weight.is_inference() and len(change.B) == weight.shape[0]


def _together(folds: Sequence[Fold]) -> Sequence[Record | None]:
    """Records of weights that are alike; None where one is to be folded by itself, its weight as it was."""
    none: list[Record | None] = [None] * len(folds)
    shape, dtype = folds[0].weight.shape, folds[0].weight.dtype
    size, budget = math.prod(shape), math.prod(shape) * dtype.itemsize - folds[0].change.nbytes
    changes = [one.change.snapshot() if budget > 0 else one.change for one in folds]
    weights = [one.weight.detach() for one in folds]
    B, A = torch.stack([one.B for one in changes]).double(), torch.stack([one.A for one in changes]).double()
    parts = exact_parts(B if changes[0].scale == 1 else B * changes[0].scale, A)
    if parts is None:
        return none
    old = torch.stack(weights).view(len(folds), *matrix_shape(shape))
    delta = torch.bmm(*parts).float()
    new = torch.add(old, delta).to(dtype)
    rows = new.view(len(folds), *shape)
    if budget <= 0:
        return [fold_copy(one.weight, row.clone(), one.note) for one, row in zip(folds, rows, strict=True)]
    back = torch.sub(new, delta)
    if math.isnan(float(back.sum())):
        return none
    want, got = (tensor.view(INTEGERS[dtype.itemsize]).view(-1).numpy() for tensor in (old, back.to(dtype)))
    positions = nonzero(want != got)
    values = want[positions] - got[positions]
    bounds = np.searchsorted(positions, np.arange(len(folds) + 1) * size).tolist()
    before, after = checksums(old), checksums(new)
    records, written = none, list[int]()
    for index in range(len(folds)):
        start, end = bounds[index], bounds[index + 1]
        corrections = Corrections.of(positions[start:end] - index * size, values[start:end])
        if corrections.nbytes > budget:
            records[index] = fold_copy(folds[index].weight, rows[index].clone(), folds[index].note)
        else:
            found = ("record", shape, dtype, after[index], before[index], changes[index], corrections)
            records[index] = record = Record(*found)  # type: ignore[arg-type]
            folds[index].note(record)
            written.append(index)
    if written:
        torch._foreach_copy_([weights[index] for index in written], [rows[index] for index in written])  # type: ignore[attr-defined]
    return records
