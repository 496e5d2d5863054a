"""Many small weights are folded and unfolded at once, with the same bits as one after the other."""

from __future__ import annotations

import math
import pickle
import zlib
from typing import Any

import numpy as np
import pytest
import torch

from surgery import LowRank, MergeError, apply_rules, merge, unmerge
from surgery.arithmetic.batched_folds import Fold, Unfold, checksums_of, fold_all, unfold_all
from surgery.arithmetic.corrections import Corrections, _pack, _unpack
from surgery.arithmetic.exact_fold import checksum, fold, unfold
from surgery.testing import Snapshot
from tests.benchmarks import verbs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("shape", "rank"), [((24, 40), 2), ((8, 8), 4), ((5, 7), 1), ((6, 3, 5), 2), ((33, 17), 3)])
def test_folds_of_many_weights_have_the_bits_of_each_alone(
    dtype: torch.dtype, shape: tuple[int, ...], rank: int
) -> None:
    def change(size: float) -> LowRank:
        return LowRank(torch.randn(shape[0], rank) * size, torch.randn(rank, *shape[1:]).flatten(1), 0.7)

    weights = [torch.randn(shape).to(dtype) for _ in range(6)]
    weights[2][0] = float("inf")
    weights[3].flatten()[1] = float("nan")
    changes = [change(size) for size in (0.01, 0.1, 0.1, 0.1, 30.0, 0.0)]
    alone, batched = ([weight.clone() for weight in weights] for _ in range(2))
    for chosen in ([0, 1, 4, 5], [2, 3]):  # a weight that is not finite makes its whole stack fold one by one
        expected = [fold(alone[index], changes[index]) for index in chosen]
        records = fold_all([Fold(batched[index], changes[index], "here") for index in chosen])
        for index, record, expected_record in zip(chosen, records, expected, strict=True):
            assert equal_bits(batched[index], alone[index]) and record.kind == expected_record.kind
            assert (record.before, record.after, record.nbytes) == (
                expected_record.before,
                expected_record.after,
                expected_record.nbytes,
            )
            unfold(batched[index], pickle.loads(pickle.dumps(record)))
            assert equal_bits(batched[index], weights[index])
            unfold(batched[index].copy_(alone[index]), expected_record)
            assert equal_bits(batched[index], weights[index])


def equal_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(24, 40), (8, 8), (6, 3, 5), (100, 160)])
def test_many_weights_are_unfolded_to_their_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Similar weights are unfolded together; weights with NaN or a copy as their record are unfolded alone."""
    weights = [torch.randn(shape).to(dtype) for _ in range(7)]
    weights[2].flatten()[1] = float("nan")
    before = [weight.clone() for weight in weights]
    rank = 2 if math.prod(shape) > 200 else 8  # with rank 8 the factors are larger than the weight
    sizes = (0.01, 0.1, 0.1, 1.0, 30.0, 0.0, 0.1)
    changes = [
        LowRank(torch.randn(shape[0], rank) * size, torch.randn(rank, math.prod(shape[1:])), 0.7) for size in sizes
    ]
    records = [fold(weight, change) for weight, change in zip(weights, changes, strict=True)]
    assert checksums_of(weights) == [checksum(weight) for weight in weights] == [record.after for record in records]
    written: list[int] = []
    notes = [lambda index=index: written.append(index) for index in range(7)]
    again = [Unfold(weight, record, "here", note) for weight, record, note in zip(weights, records, notes, strict=True)]
    unfold_all(again)
    assert all(map(equal_bits, weights, before)) and sorted(written) == list(range(7))


def test_weights_that_can_not_be_unfolded_stay_as_they_are() -> None:
    weights = [torch.randn(8, 16) for _ in range(3)]
    records = [fold(weight, LowRank(torch.randn(8, 2), torch.randn(2, 16))) for weight in weights]
    weights[1] += 1
    after = [weight.clone() for weight in weights]
    with pytest.raises(MergeError, match="did not come back"):
        unfold_all([Unfold(weight, record, "here") for weight, record in zip(weights, records, strict=True)])
    assert equal_bits(weights[1], after[1])


@pytest.mark.parametrize("dtype", [np.int32, np.int16])
@pytest.mark.parametrize("density", [0, 0.002, 0.05, 0.2, 0.9])
def test_corrections_packed_together_are_those_packed_alone(dtype: Any, density: float) -> None:
    rng, size, count = np.random.default_rng(0), 5000, 7
    mask = rng.random(size * count) < density
    mask[size : 2 * size] = False
    positions = np.flatnonzero(mask)
    values = rng.choice([1, -1, 1, -1, 2, -300, np.iinfo(dtype).min], len(positions)).astype(dtype)
    bounds = np.searchsorted(positions, np.arange(count + 1) * size).tolist()
    for index, batched in enumerate(Corrections.of_many(positions, values, bounds, size)):
        start, end = bounds[index : index + 2]
        alone = Corrections.of(positions[start:end] - index * size, values[start:end])
        assert (batched.chunks, batched.nbytes) == (alone.chunks, alone.nbytes)


def test_weights_that_share_memory_are_folded_in_turn() -> None:
    weight, change = torch.randn(8, 16), LowRank(torch.randn(8, 2), torch.randn(2, 16))
    expected = weight + 3 * (change.B @ change.A)
    fold_all([Fold(weight.view(8, 16), change, "") for _ in range(3)])
    torch.testing.assert_close(weight, expected)


def test_compressed_corrections_are_read() -> None:
    """Earlier versions compressed small numbers of corrections, too."""
    positions, values = np.array([3, 4, 90, 70000]), np.array([1, -1, 5, -300])
    base, header, plain, packed = _pack(positions, values)
    assert plain == len(packed)
    for old in ((base, header, 0, zlib.compress(packed)), (base, header, plain, packed)):
        unpacked = _unpack(*old)
        assert unpacked[0].tolist() == positions.tolist() and unpacked[1].tolist() == values.tolist()


def test_a_merge_of_many_is_undone_where_one_is_refused() -> None:
    model = verbs.Layers(3, 8)
    apply_rules(model, verbs.rule())
    with torch.no_grad():
        model.layers[2].d.adapters.default.A[0, 0] = float("nan")  # type: ignore[union-attr, index, operator]
    before = Snapshot(model)
    with pytest.raises(MergeError):
        merge(model, safe=True)
    assert not before.differences(model)
    merge(model)
    unmerge(model)
    assert not before.differences(model)
