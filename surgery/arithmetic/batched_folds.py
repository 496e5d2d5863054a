"""Folds and unfolds many small weights at once, with the same bits as one after the other but fewer calls of torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from surgery.arithmetic.corrections import INTEGERS, Corrections, Record, _unpack, checksum, checksums, nonzero
from surgery.arithmetic.exact_fold import check_foldable, fold, unfold
from surgery.arithmetic.low_rank import LowRank, exact_parts, matrix_shape
from surgery.arithmetic.weight_copies import fold_copy

__all__ = ["Fold", "Unfold", "checksums_of", "fold_all", "unfold_all"]

SMALL = 1 << 14  # entries; the arithmetic of a larger weight takes longer than its calls of torch
_STACK_ENTRIES = 1 << 17  # the most entries of a stack, so that its temporaries stay in cache
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Fold(NamedTuple):
    """A low-rank change of a weight.

    `where`: the weight's name in errors. `note`: called with the record before the weight is written.
    """

    weight: Tensor
    change: LowRank
    where: str
    note: Callable[[Record], None] = lambda record: None


def fold_all(folds: Sequence[Fold]) -> list[Record]:
    """Call `fold(…, keep="record")` for each; similar small weights share the calls. Returns the records."""
    records: list[Record | None] = [None] * len(folds)
    groups, addresses = dict[tuple, list[int]](), set[int]()
    for index, job in enumerate(folds):
        check_foldable(job.weight, job.change, job.where)
        if (
            _small(job.weight, job.change) and job.weight.data_ptr() not in addresses
        ):  # weights that share memory are folded in turn
            addresses.add(job.weight.data_ptr())
            groups.setdefault(_kind(job.weight, job.change), []).append(index)
    for indices in _stacks(groups.values(), [job.weight for job in folds]):
        for index, record in zip(indices, _fold_stack([folds[index] for index in indices]), strict=True):
            records[index] = record
    return [
        record if record is not None else fold(job.weight, job.change, where=job.where, note=job.note)
        for job, record in zip(folds, records, strict=True)
    ]


class Unfold(NamedTuple):
    """A weight with the bits that a fold wrote, and the fold's record.

    `where`: the weight's name in errors. `note`: called before the weight is written.
    """

    weight: Tensor
    record: Record
    where: str
    note: Callable[[], None] = lambda: None


def unfold_all(unfolds: Sequence[Unfold]) -> None:
    """Call `unfold(…, verified=True)` for each. Similar small weights share the calls."""
    address_counts = Counter(job.weight.data_ptr() for job in unfolds)
    groups, unfolded = dict[tuple, list[int]](), set[int]()
    for index, job in enumerate(unfolds):
        change, corrections = job.record.change, job.record.corrections
        if change is None or corrections is None or corrections.nan_positions:
            continue
        if _small(job.weight, change) and address_counts[job.weight.data_ptr()] == 1:
            groups.setdefault(_kind(job.weight, change), []).append(index)
    for indices in _stacks(groups.values(), [job.weight for job in unfolds]):
        if _unfold_stack([unfolds[index] for index in indices]):
            unfolded.update(indices)
    for index, job in enumerate(unfolds):
        if index not in unfolded:
            job.note()
            unfold(job.weight, job.record, where=job.where, verified=True)


def checksums_of(tensors: Sequence[Tensor]) -> list[int]:
    """Returns the `checksum` of each tensor. Similar small tensors share the calls."""
    groups, sums = dict[tuple, list[int]](), dict[int, int]()
    for index, tensor in enumerate(tensors):
        if _stackable(tensor) and tensor.dim():
            groups.setdefault((tensor.shape, tensor.dtype), []).append(index)
    for indices in _stacks(groups.values(), tensors):
        stack = torch.stack([tensors[index].detach() for index in indices])
        sums |= zip(indices, checksums(stack.view(len(indices), *matrix_shape(stack.shape[1:]))), strict=True)
    return [sums[index] if index in sums else checksum(tensor) for index, tensor in enumerate(tensors)]


def _stacks(groups: Iterable[list[int]], weights: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yields the indices of the weights of each stack: two or more of a group of similar weights."""
    for group in groups:
        most = max(1, _STACK_ENTRIES // weights[group[0]].numel())
        for start in range(0, len(group), most):
            if len(part := group[start : start + most]) > 1:
                yield part


def _kind(weight: Tensor, change: LowRank) -> tuple:
    """Returns a key that is equal for weights and changes of one stack."""
    return weight.shape, weight.dtype, change.B.dtype, change.A.dtype, len(change.A), change.scale


def _small(weight: Tensor, change: LowRank) -> bool:
    simple = change.groups == 1 and change.gain is None and type(change.scale) in (int, float)
    on_cpu = change.A.device.type == "cpu" and change.B.device.type == "cpu"
    return simple and on_cpu and _stackable(weight) and len(change.B) == weight.shape[0]


def _stackable(weight: Tensor) -> bool:
    fits = weight.dtype in _DTYPES and 0 < weight.numel() <= SMALL and weight.is_contiguous()
    return weight.device.type == "cpu" and fits and not weight.is_inference()


def _fold_stack(folds: Sequence[Fold]) -> Sequence[Record | None]:
    """Fold similar weights. Returns their records, or None for each weight that must be folded by itself."""
    no_records: list[Record | None] = [None] * len(folds)
    shape, dtype = folds[0].weight.shape, folds[0].weight.dtype
    size, budget = math.prod(shape), math.prod(shape) * dtype.itemsize - folds[0].change.nbytes
    changes = [job.change.snapshot() if budget > 0 else job.change for job in folds]
    weights = [job.weight.detach() for job in folds]
    delta = _delta(changes)
    if delta is None:
        return no_records
    old = torch.stack(weights).view(len(folds), *matrix_shape(shape))
    total = torch.add(old, delta)
    new = total.to(dtype)
    error = (new - old).sub_(delta) if new is total else total.sub_(new)
    norms = torch.stack((delta.flatten(1).norm(dim=1), error.flatten(1).norm(dim=1)), 1).tolist()
    rows = new.view(len(folds), *shape)
    if budget <= 0:
        return [
            fold_copy(job.weight, row.clone(), job.note, (norm, lost))
            for job, row, (norm, lost) in zip(folds, rows, norms, strict=True)
        ]
    back = torch.sub(new, delta)
    if math.isnan(float(back.sum())):
        return no_records
    expected_bits, computed_bits = (
        tensor.view(INTEGERS[dtype.itemsize]).view(-1).numpy() for tensor in (old, back.to(dtype))
    )
    positions = nonzero(expected_bits != computed_bits)
    values = expected_bits[positions] - computed_bits[positions]
    bounds = np.searchsorted(positions, np.arange(len(folds) + 1) * size).tolist()
    before, after = checksums(old), checksums(new)
    records, changed = no_records, list[int]()
    for index, corrections in enumerate(Corrections.of_many(positions, values, bounds, size)):
        if corrections.nbytes > budget:
            records[index] = fold_copy(folds[index].weight, rows[index].clone(), folds[index].note, tuple(norms[index]))
        else:
            fields = ("record", shape, dtype, after[index], before[index], changes[index], corrections)
            records[index] = record = Record(*fields)  # type: ignore[arg-type]
            record.norm, record.error = norms[index]
            folds[index].note(record)
            changed.append(index)
    if changed:
        torch._foreach_copy_([weights[index] for index in changed], [rows[index] for index in changed])  # type: ignore[attr-defined]
    return records


def _unfold_stack(unfolds: Sequence[Unfold]) -> bool:
    """Unfold similar weights. Returns whether all got their bits before the fold; otherwise none changes."""
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
    """Returns ΔW of similar changes, (k, m, n) in float32, with the bits of each alone. None if it is not exact."""
    B, A = torch.stack([job.B for job in changes]).double(), torch.stack([job.A for job in changes]).double()
    parts = exact_parts(B if changes[0].scale == 1 else B * changes[0].scale, A)
    return None if parts is None else torch.bmm(*parts).float()
