"""Folds of many small weights at once, and their undoing: the same bits as one by one, in a fraction of the calls."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from surgery.arithmetic.corrections import INTEGERS, Corrections, Record, _unpack, checksum, checksums, nonzero
from surgery.arithmetic.exact_fold import fold, fold_copy, refuse, unfold
from surgery.arithmetic.low_rank import LowRank, exact_parts, matrix_shape

__all__ = ["Fold", "Unfold", "checksums_of", "fold_all", "unfold_all"]

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
    for index, job in enumerate(folds):
        refuse(job.weight, job.change, job.where)
        if _small(job.weight, job.change) and job.weight.data_ptr() not in places:  # what shares memory: in turn
            places.add(job.weight.data_ptr())
            alike.setdefault(_kind(job.weight, job.change), []).append(index)
    for some in _stacks(alike.values(), [job.weight for job in folds]):
        for index, record in zip(some, _fold_stack([folds[index] for index in some]), strict=True):
            records[index] = record
    return [
        record if record is not None else fold(job.weight, job.change, where=job.where, note=job.note)
        for job, record in zip(folds, records, strict=True)
    ]


class Unfold(NamedTuple):
    """A weight with the bits that a fold wrote, the fold's record, the weight's name in errors, and what to call
    before the weight is written."""

    weight: Tensor
    record: Record
    where: str
    note: Callable[[], None] = lambda: None


def unfold_all(unfolds: Sequence[Unfold]) -> None:
    """`exact.unfold(…, verified=True)` of each."""
    places = Counter(job.weight.data_ptr() for job in unfolds)
    alike, done = dict[tuple, list[int]](), set[int]()
    for index, job in enumerate(unfolds):
        change, corrections = job.record.change, job.record.corrections
        if change is None or corrections is None or corrections.nan_positions:
            continue
        if _small(job.weight, change) and places[job.weight.data_ptr()] == 1:
            alike.setdefault(_kind(job.weight, change), []).append(index)
    for some in _stacks(alike.values(), [job.weight for job in unfolds]):
        if _unfold_stack([unfolds[index] for index in some]):
            done.update(some)
    for index, job in enumerate(unfolds):
        if index not in done:
            job.note()
            unfold(job.weight, job.record, where=job.where, verified=True)


def checksums_of(tensors: Sequence[Tensor]) -> list[int]:
    """`checksum` of each."""
    alike, known = dict[tuple, list[int]](), dict[int, int]()
    for index, tensor in enumerate(tensors):
        if _stackable(tensor) and tensor.dim():
            alike.setdefault((tensor.shape, tensor.dtype), []).append(index)
    for some in _stacks(alike.values(), tensors):
        stack = torch.stack([tensors[index].detach() for index in some])
        known |= zip(some, checksums(stack.view(len(some), *matrix_shape(stack.shape[1:]))), strict=True)
    return [known[index] if index in known else checksum(tensor) for index, tensor in enumerate(tensors)]


def _stacks(alike: Iterable[list[int]], weights: Sequence[Tensor]) -> Iterator[list[int]]:
    """Places of weights that are alike, as many as make a stack, and at least two."""
    for indices in alike:
        most = max(1, _TOGETHER // weights[indices[0]].numel())
        for start in range(0, len(indices), most):
            if len(some := indices[start : start + most]) > 1:
                yield some


def _kind(weight: Tensor, change: LowRank) -> tuple:
    """What weights and changes of one stack have in common."""
    return weight.shape, weight.dtype, change.B.dtype, change.A.dtype, len(change.A), change.scale


def _small(weight: Tensor, change: LowRank) -> bool:
    plain = change.groups == 1 and change.gain is None and type(change.scale) in (int, float)
    here = change.A.device.type == "cpu" and change.B.device.type == "cpu"
    return plain and here and _stackable(weight) and len(change.B) == weight.shape[0]


def _stackable(weight: Tensor) -> bool:
    fits = weight.dtype in _DTYPES and 0 < weight.numel() <= SMALL and weight.is_contiguous()
    return weight.device.type == "cpu" and fits and not weight.is_inference()


def _fold_stack(folds: Sequence[Fold]) -> Sequence[Record | None]:
    """Records of weights that are alike; None where one is to be folded by itself, its weight as it was."""
    none: list[Record | None] = [None] * len(folds)
    shape, dtype = folds[0].weight.shape, folds[0].weight.dtype
    size, budget = math.prod(shape), math.prod(shape) * dtype.itemsize - folds[0].change.nbytes
    changes = [job.change.snapshot() if budget > 0 else job.change for job in folds]
    weights = [job.weight.detach() for job in folds]
    delta = _delta(changes)
    if delta is None:
        return none
    old = torch.stack(weights).view(len(folds), *matrix_shape(shape))
    new = torch.add(old, delta).to(dtype)
    rows = new.view(len(folds), *shape)
    if budget <= 0:
        return [fold_copy(job.weight, row.clone(), job.note) for job, row in zip(folds, rows, strict=True)]
    back = torch.sub(new, delta)
    if math.isnan(float(back.sum())):
        return none
    want, got = (tensor.view(INTEGERS[dtype.itemsize]).view(-1).numpy() for tensor in (old, back.to(dtype)))
    positions = nonzero(want != got)
    values = want[positions] - got[positions]
    bounds = np.searchsorted(positions, np.arange(len(folds) + 1) * size).tolist()
    before, after = checksums(old), checksums(new)
    records, changed = none, list[int]()
    for index, corrections in enumerate(Corrections.of_many(positions, values, bounds, size)):
        if corrections.nbytes > budget:
            records[index] = fold_copy(folds[index].weight, rows[index].clone(), folds[index].note)
        else:
            fields = ("record", shape, dtype, after[index], before[index], changes[index], corrections)
            records[index] = record = Record(*fields)  # type: ignore[arg-type]
            folds[index].note(record)
            changed.append(index)
    if changed:
        torch._foreach_copy_([weights[index] for index in changed], [rows[index] for index in changed])  # type: ignore[attr-defined]
    return records


def _unfold_stack(unfolds: Sequence[Unfold]) -> bool:
    """Whether these weights, which are alike, got their bits from before their folds; if not, they are as they were."""
    shape, dtype = unfolds[0].weight.shape, unfolds[0].weight.dtype
    weights, size = [job.weight.detach() for job in unfolds], math.prod(shape)
    delta = _delta([job.record.change for job in unfolds if job.record.change is not None])
    if delta is None:
        return False
    restored = torch.sub(torch.stack(weights).view(len(unfolds), *matrix_shape(shape)), delta).to(dtype)
    bits = restored.view(INTEGERS[dtype.itemsize]).view(-1).numpy()
    corrections = [job.record.corrections for job in unfolds]
    parts = [
        (i * size, *_unpack(*chunk)) for i, job in enumerate(corrections) if job is not None for chunk in job.chunks
    ]
    if parts:
        positions = np.concatenate([start + places for start, places, _ in parts])
        bits[positions] += np.concatenate([values for *_, values in parts]).astype(bits.dtype)
    if checksums(restored) != [job.record.before for job in unfolds]:
        return False
    for job in unfolds:
        job.note()
    torch._foreach_copy_(weights, list(restored.view(len(unfolds), *shape)))  # type: ignore[attr-defined]
    return True


def _delta(changes: Sequence[LowRank]) -> Tensor | None:
    """ΔW of changes that are alike, (k, m, n) in float32, with the bits of each alone; None where it is not exact."""
    B, A = torch.stack([job.B for job in changes]).double(), torch.stack([job.A for job in changes]).double()
    parts = exact_parts(B if changes[0].scale == 1 else B * changes[0].scale, A)
    return None if parts is None else torch.bmm(*parts).float()
