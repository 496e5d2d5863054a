"""Exact merge arithmetic: unfolding restores a weight bit for bit, whatever happened in between."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import surgery.arithmetic.fold_arithmetic as fold_arithmetic
from surgery.arithmetic.corrections import INTEGERS
from surgery.arithmetic.exact_fold import LowRank, Record, Rows, checksum, fold, folded_value, unfold
from surgery.errors import MergeError
from tests.support import ROOT

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-40, 3e38, -3e38, 6e-8, 65504.0]


def bits(tensor: Tensor) -> Tensor:
    """Returns the raw bits. torch.equal distinguishes 0.0 from -0.0, and NaNs from each other, only as integers."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def low_rank(m: int, n: int, rank: int, size: float = 0.03, seed: int = 0, **fields) -> LowRank:
    """Returns a change whose Frobenius norm is `size` times the norm of a weight with entries N(0, 1 / n)."""
    g = torch.Generator().manual_seed(seed)
    B, A = torch.randn(m, rank, generator=g), torch.randn(rank, n, generator=g)
    return LowRank(B * (size * m**0.5 / (B @ A).norm()), A, **fields)


def weight_of(m: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return (torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) / n**0.5).to(dtype)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ΔW ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, bound", [(1, 1e-7), (8, 1.2e-7), (64, 4e-7), (256, 8e-7)])
def test_delta_is_as_right_as_a_float32_matmul(rank, bound):
    change = low_rank(96, 80, rank, scale=0.7)
    reference = (change.B.double() * 0.7) @ change.A.double()
    assert (change.delta((96, 80)) - reference).norm() <= bound * reference.norm()
    precise = change.delta((96, 80), torch.float64)
    assert precise.dtype == torch.float64
    # Two summands keep over 44 bits of a factor's entries, relative to the largest in a row or column.
    assert (precise - reference).norm() <= 1e-12 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_delta_has_the_same_bits_for_any_order_and_number_of_threads(threads, dtype):
    half = low_rank(300, 257, 12)
    # The products nearly cancel, so the sum would show any rounding of a partial sum.
    change = LowRank(torch.cat([half.B, half.B * -(1 + 2**-18)], 1), torch.cat([half.A, half.A]), torch.ones(24))
    assert isinstance(change.scale, Tensor)
    threads(1)
    expected = bits(change.delta((300, 257), dtype))
    for count in (2, 1):
        threads(count)
        order = torch.randperm(24)
        permuted = LowRank(change.B[:, order], change.A[order], change.scale[order])
        assert torch.equal(bits(permuted.delta((300, 257), dtype)), expected)
    # A matmul of one row may use another kernel.
    rows = [LowRank(change.B[i : i + 1], change.A, change.scale).delta((1, 257), dtype) for i in range(0, 300, 50)]
    assert torch.equal(bits(torch.cat(rows)), expected[::50])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_of_any_dtype(dtype):
    change = low_rank(20, 30, 4)
    change = LowRank(change.B.to(dtype), change.A.to(dtype), 2)
    reference = 2 * change.B.double() @ change.A.double()
    assert (change.delta((20, 30)) - reference).norm() <= 1e-7 * reference.norm()


def test_delta_of_groups_is_block_by_block():
    B, A = torch.randn(12, 2), torch.randn(6, 2 * 9)  # 3 groups of 4 output channels, rank 2 each
    scale = torch.rand(6)
    delta = LowRank(B, A, scale, groups=3).delta((12, 2, 3, 3))
    blocks = [(B[4 * j : 4 * j + 4] * scale[2 * j : 2 * j + 2]) @ A[2 * j : 2 * j + 2] for j in range(3)]
    torch.testing.assert_close(delta, torch.cat(blocks).view(12, 2, 3, 3))  # a float32 matmul's rounding


def test_join_is_the_sum():
    parts = [low_rank(9, 7, 3, scale=0.5), low_rank(9, 7, 2, seed=5, scale=torch.rand(2)), low_rank(9, 7, 1, seed=6)]
    total = torch.stack([part.delta((9, 7), torch.float64) for part in parts]).sum(0)
    assert (LowRank.join(parts).delta((9, 7), torch.float64) - total).norm() <= 1e-12 * total.norm()
    with pytest.raises(MergeError):
        LowRank.join([parts[0], LowRank(torch.ones(9, 1), torch.ones(1, 7), gain=torch.ones(9))])


@pytest.mark.parametrize("spread", [30, 120])
def test_delta_of_factors_with_a_huge_range(spread):
    g = torch.Generator().manual_seed(0)
    B = torch.randn(8, 3, generator=g) * 2.0 ** torch.linspace(-spread, spread, 8)[:, None]
    A = torch.randn(3, 8, generator=g) * 2.0 ** -torch.linspace(-spread, spread, 8)
    B[2], A[:, 3] = 0, 0
    reference = B.double() @ A.double()
    error = (LowRank(B, A).delta((8, 8), torch.float64) - reference).abs()
    assert (error <= 1e-10 * B.double().abs() @ A.double().abs()).all()  # each entry relative to its own products


@pytest.mark.parametrize("tiny", [5e-324, 1e-310, 1e-200])
def test_factors_beyond_the_grid_are_zero_or_right(tiny):
    change = LowRank(torch.full((3, 2), tiny, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64))
    assert (change.delta((3, 3), torch.float64) - 2 * tiny).abs().max() <= 2.0**-500


# Fold and unfold --------------------------------------------------------------------------------------------------


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    padded = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype)
    variants = {"plain": tensor, "strided": padded[..., 1::2].copy_(tensor)}
    if tensor.dim() >= 2:
        variants["transposed"] = tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if tensor.dim() == 4:
        variants["channels_last"] = tensor.contiguous(memory_format=torch.channels_last)
    return variants


@st.composite
def cases(draw) -> tuple[Tensor, LowRank]:
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    shape = (
        groups * draw(st.integers(0 if groups == 1 else 1, 6)),
        *draw(st.sampled_from([(), (0,), (1,), (5,), (16,), (3, 3), (2, 3, 3), (1, 1, 1)])),
    )
    weight = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    flat = weight.view(-1)
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=4)):
        if len(flat):
            flat[draw(st.integers(0, len(flat) - 1))] = value
    layout = draw(st.sampled_from(sorted(layouts(weight))))
    weight = layouts(weight)[layout]
    m, n = shape[0], math.prod(shape[1:])
    rank = draw(st.integers(1, 3)) * groups
    factor = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    size = 10.0 ** draw(st.sampled_from([-40, -6, -2, 0, 1, 30]))
    B = (torch.randn(m, rank // groups, generator=g, dtype=torch.float64) * size).to(factor)
    A = torch.randn(rank, n, generator=g).to(factor)
    if draw(st.booleans()) and A.numel() and B.numel():
        (A if draw(st.booleans()) else B).view(-1)[0] = draw(st.sampled_from(SPECIAL))
    scale = draw(st.sampled_from([1.0, 0.25, 3, -1.3, "per rank"]))
    gain = draw(st.sampled_from(["none", "none", "rows", "columns", "zeros"]))
    gains = {
        "none": None,
        "rows": torch.rand(m, generator=g) + 0.5,
        "columns": torch.rand((1, *shape[1:]), generator=g) + 0.5,
        "zeros": torch.zeros(m),
    }
    scale = torch.rand(rank, generator=g) if isinstance(scale, str) else scale
    return weight, LowRank(B, A, scale, groups, gains[gain])


@pytest.mark.parametrize("keep", ["record", "copy"])
def test_a_single_row_keeps_its_strides(keep: Any) -> None:
    weight = torch.randn(1, 2, 3, 3).to(memory_format=torch.channels_last)
    strides, before = weight.stride(), weight.clone()
    record = fold(weight, LowRank(torch.full((1, 1), 1e-40), torch.randn(1, 18)), keep=keep)
    assert weight.stride() == strides
    unfold(weight, record)
    assert weight.stride() == strides and torch.equal(weight, before)


@settings(max_examples=300, deadline=None)
@given(cases(), st.sampled_from(["record", "copy"]), st.booleans())
def test_fold_then_unfold_gives_back_the_bits(case, keep, pickled):
    weight, change = case
    original, strides, address = weight.clone(), weight.stride(), weight.data_ptr()
    expected = folded_value(weight, change)
    record = fold(weight, change, keep=keep)
    if keep == "record":
        nan = weight.isnan()  # the bits of torch's NaNs depend on how many numbers it rounds at once
        assert torch.equal(nan, expected.isnan())
        assert torch.equal(bits(weight.masked_fill(nan, 0)), bits(expected.masked_fill(nan, 0)))
    if pickled:
        record = pickle.loads(pickle.dumps(record))
    assert weight.stride() == strides
    assert record.nbytes >= 0 and record.kind in ("record", "copy")
    unfold(weight, record)
    assert torch.equal(bits(weight), bits(original))
    assert weight.stride() == strides
    if not pickled:
        assert weight.data_ptr() == address


@pytest.mark.parametrize("dtype", DTYPES)
def test_folded_value_is_rounded_once(dtype):
    weight, change = weight_of(40, 30, dtype), low_rank(40, 30, 4)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (weight.to(compute) + change.delta((40, 30), dtype)).to(dtype)
    assert torch.equal(folded_value(weight, change), expected)
    gain = torch.rand(40) + 0.5
    scaled = LowRank(change.B, change.A, gain=gain)
    expected = (gain.to(compute)[:, None] * (weight.to(compute) + change.delta((40, 30), dtype))).to(dtype)
    assert torch.equal(folded_value(weight, scaled), expected)
    fold(weight, scaled)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_a_copy_folds_to_within_rounding(dtype, layout):
    weight, change = layouts(weight_of(40, 30, dtype))[layout], low_rank(40, 30, 4, size=1.0, scale=0.3)
    expected = folded_value(weight, change)
    record = fold(weight, change, keep="copy")
    assert record.kind == "copy"
    torch.testing.assert_close(weight, expected)  # a matmul's rounding, and at most one rounding to the weight's dtype


def test_the_weight_stays_the_parameter_it_was():
    weight = torch.nn.Parameter(weight_of(20, 20))
    weight.grad = torch.ones_like(weight)
    for keep in ("record", "copy"):
        unfold(weight, fold(weight, low_rank(20, 20, 2), keep=keep))
        assert weight.requires_grad and weight.is_leaf and weight.grad is not None
        weight.sum().backward()


@pytest.mark.parametrize("shape", [(700, 600), (3, 300_000), (260, 32, 5, 7), (513, 1, 9)])
def test_weights_of_several_tiles(shape):
    groups = 27 if shape == (513, 1, 9) else 1
    m, n = shape[0], math.prod(shape[1:])
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=g)
    original = weight.clone()
    change = LowRank(torch.randn(m, 2, generator=g) * 0.02, torch.randn(2 * groups, n, generator=g), groups=groups)
    record = fold(weight, change)
    assert record.kind == "record"
    assert torch.equal(weight, original + change.delta(shape))
    unfold(weight, record)
    assert torch.equal(bits(weight), bits(original))


# Whatever happens in between --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_threads_and_trained_factors_do_not_matter(threads, dtype):
    weight, change = weight_of(256, 192, dtype), low_rank(256, 192, 8)
    original = weight.clone()
    threads(2)
    record = fold(weight, change)
    assert record.kind == "record"
    change.B.normal_()
    change.A.zero_()
    threads(1)
    unfold(weight, record)
    assert torch.equal(bits(weight), bits(original))


def test_the_record_works_in_a_new_process(tmp_path: Path):
    weights = {dtype: weight_of(96, 80, dtype) for dtype in DTYPES}
    originals = {dtype: bits(weight).clone() for dtype, weight in weights.items()}
    weights[torch.float32][3, 4] = originals[torch.float32][3, 4] = 0
    records = {
        dtype: [
            fold(weight, low_rank(96, 80, 8)),
            fold(weight, Rows(torch.tensor([3, 1]), torch.ones(2, 80))),
            fold(weight, low_rank(96, 80, 4, seed=9), keep="copy"),
        ]
        for dtype, weight in weights.items()
    }
    (tmp_path / "merged.pickle").write_bytes(pickle.dumps((weights, records, originals)))
    code = f"""
import pickle, torch
from surgery.arithmetic.exact_fold import unfold
torch.set_num_threads(2)
weights, records, originals = pickle.load(open({str(tmp_path / "merged.pickle")!r}, "rb"))
for dtype, weight in weights.items():
    for record in reversed(records[dtype]):
        unfold(weight, record)
    assert torch.equal(weight.view(originals[dtype].dtype), originals[dtype]), dtype
print("to the bit")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.stdout.strip() == "to the bit", process.stderr


def test_a_lossless_trip_through_another_dtype_and_layout():
    weight = weight_of(64, 48, torch.bfloat16).view(8, 8, 6, 8)
    original = weight.clone()
    record = fold(weight, low_rank(8, 8 * 6 * 8, 2))
    weight = weight.float().bfloat16().contiguous(memory_format=torch.channels_last)
    unfold(weight, record)
    assert torch.equal(bits(weight), bits(original))


def test_a_device_without_float64_is_served_on_the_cpu(monkeypatch):
    weight = weight_of(32, 48)
    original, expected = weight.clone(), folded_value(weight, low_rank(32, 48, 2))
    monkeypatch.setattr(fold_arithmetic, "has_float64", lambda device: False)
    record = fold(weight, low_rank(32, 48, 2))
    assert torch.equal(weight, expected)
    unfold(weight, record)
    assert torch.equal(weight, original)


@pytest.mark.parametrize("keep", ["record", "copy"])
def test_autocast_and_inference_mode_change_nothing(keep):
    weight, change = weight_of(32, 48), low_rank(32, 48, 2)
    original = weight.clone()
    expected = weight.clone()
    fold(expected, change, keep=keep)
    with torch.autocast("cpu", torch.bfloat16):
        record = fold(weight, change, keep=keep)
    assert torch.equal(weight, expected)
    with torch.inference_mode():
        unfold(weight, record)
    assert torch.equal(weight, original) and not weight.is_inference()
    with torch.inference_mode():
        inner = original.clone()
        unfold(inner, fold(inner, change, keep=keep))
        assert torch.equal(inner, original)
    unfold(weight, fold(weight, change, keep=keep))  # scratch memory from inference mode also works outside it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_hundred_cycles_do_not_drift(dtype):
    weight = weight_of(64, 64, dtype)
    original = weight.clone()
    for cycle in range(100):
        first = fold(weight, low_rank(64, 64, 3, size=0.1, seed=cycle))
        second = fold(weight, low_rank(64, 64, 2, size=0.3, seed=-cycle))
        unfold(weight, second)
        unfold(weight, first)
    assert torch.equal(bits(weight), bits(original))


# Records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size, bound", [(0.003, 0.03), (0.03, 0.08), (0.32, 0.25)])
def test_corrections_are_small(dtype, size, bound):
    weight, change = weight_of(512, 512, dtype), low_rank(512, 512, 8, size=size)
    record = fold(weight, change)
    assert record.kind == "record" and record.corrections is not None
    assert 0 < record.corrections.nbytes <= bound * weight.numel()
    assert record.nbytes == record.corrections.nbytes + change.nbytes
    packed = sum(len(chunk[-1]) for chunk in record.corrections.chunks)
    assert packed <= record.corrections.nbytes <= packed + 64 * len(record.corrections.chunks)
    assert len(pickle.dumps(record)) <= record.nbytes + 4096


@pytest.mark.parametrize(
    "weight, change",
    [
        (weight_of(8, 8), low_rank(8, 8, 8)),  # the factors are as large as the weight
        (torch.full((64, 64), math.nan), low_rank(64, 64, 2)),  # every entry would need a correction
        (weight_of(64, 64), LowRank(torch.full((64, 1), math.inf), torch.ones(1, 64))),
        (weight_of(64, 64), LowRank(torch.full((64, 1), 1e30), torch.full((1, 64), 1e30))),
        (weight_of(64, 64), LowRank(torch.full((64, 1), 1e300, dtype=torch.float64), torch.full((1, 64), math.nan))),
        (weight_of(64, 64, torch.float64), LowRank(torch.full((64, 1), 1e300, dtype=torch.float64), torch.ones(1, 64))),
    ],
)
def test_a_copy_is_kept_where_it_is_smaller(weight, change):
    weight = weight.clone()
    original = weight.clone()
    record = fold(weight, change)
    assert record.kind == "copy" and record.nbytes == original.numel() * original.element_size()
    unfold(weight, record)
    assert torch.equal(bits(weight), bits(original))


def test_a_few_nans_do_not_cost_the_record():
    weight = weight_of(64, 64)
    weight[5, 7], weight[9, 1] = math.nan, math.inf
    weight.view(torch.int32)[0, 0] = 0x7F812345  # a signalling NaN with a payload
    original = weight.clone()
    record = fold(weight, low_rank(64, 64, 2))
    assert record.kind == "record"
    unfold(weight, record)
    assert torch.equal(bits(weight), bits(original))


def test_memory_is_exchanged_only_where_nobody_else_sees_it():
    alone = torch.nn.Parameter(weight_of(32, 32))
    address = alone.data_ptr()
    record = fold(alone, low_rank(32, 32, 2), keep="copy")
    assert alone.data_ptr() != address
    unfold(alone, record)
    assert alone.data_ptr() == address
    with pytest.raises(MergeError, match="changed|undone"):
        unfold(alone, record)

    seen = torch.nn.Parameter(weight_of(32, 32))
    alias, address = seen.detach(), seen.data_ptr()
    record = fold(seen, low_rank(32, 32, 2), keep="copy")
    assert seen.data_ptr() == address and torch.equal(alias, seen)
    unfold(seen, record)
    assert torch.equal(alias, weight_of(32, 32))

    whole = weight_of(96, 32)
    fold(whole[:32], low_rank(32, 32, 2), keep="copy")
    assert not torch.equal(whole[:32], weight_of(96, 32)[:32]) and torch.equal(whole[32:], weight_of(96, 32)[32:])


def test_a_clone_does_not_use_the_record_up():
    weight = weight_of(32, 32)
    original = weight.clone()
    record = fold(weight, low_rank(32, 32, 2), keep="copy")
    twin, twin_record = copy.deepcopy((weight, record))
    for copied, copied_record in ((weight.clone(), record), (twin, twin_record), (weight, record)):
        unfold(copied, copied_record)
        assert torch.equal(copied, original)


# Other changes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_keep_only_what_they_overwrite(dtype):
    weight = weight_of(50, 8, dtype)
    original, index, values = weight.clone(), torch.tensor([7, 3]), torch.randn(2, 8)
    assert torch.equal(folded_value(weight, Rows(index, values))[[7, 3]], values.to(dtype))
    record = fold(weight, Rows(index, values), keep="copy")
    assert record.kind == "rows" and record.nbytes == 2 * 8 * dtype.itemsize + 16
    assert torch.equal(weight[index], values.to(dtype))
    unfold(weight, record)
    assert torch.equal(bits(weight), bits(original))


@pytest.mark.parametrize("weight", [torch.tensor(3.0), torch.randn(4), torch.zeros(0, 3), torch.arange(6).view(2, 3)])
def test_a_tensor_is_the_new_value(weight):
    weight = weight.clone()
    original, value = weight.clone(), torch.ones(weight.shape, dtype=torch.float64)
    record = fold(weight, value)
    assert torch.equal(weight, value.to(weight.dtype))
    value.zero_()  # the weight has a copy of it
    assert bool((weight == 1).all())
    unfold(weight, record)
    assert torch.equal(weight, original)


def test_folds_come_out_in_reverse_order():
    weight = weight_of(48, 32, torch.bfloat16)
    original = weight.clone()
    changes = [
        low_rank(48, 32, 2),
        Rows(torch.tensor([0]), torch.ones(1, 32)),
        torch.randn(48, 32),
        low_rank(48, 32, 1),
    ]
    records = [fold(weight, change) for change in changes]
    with pytest.raises(MergeError):
        unfold(weight, records[0])
    for record in reversed(records):
        unfold(weight, record)
    assert torch.equal(bits(weight), bits(original))


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        low_rank(6, 5, 2),
        low_rank(5, 4, 2),
        LowRank(torch.ones(6, 2), torch.ones(3, 4)),
        LowRank(torch.ones(6, 0), torch.ones(0, 4)),
        LowRank(torch.ones(6, 1), torch.ones(4, 4), groups=4),
        LowRank(torch.ones(6, 2), torch.ones(2, 4), torch.ones(3)),
        LowRank(torch.ones(6, 2), torch.ones(2, 4), gain=torch.ones(5)),
        Rows(torch.tensor([6]), torch.ones(1, 4)),
        Rows(torch.tensor([1, 1]), torch.ones(2, 4)),
        Rows(torch.tensor([1]), torch.ones(1, 5)),
        torch.ones(4, 6),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_touched(change):
    weight = torch.randn(6, 4)
    original = weight.clone()
    with pytest.raises(MergeError, match="layer.weight"):
        fold(weight, change, where="layer.weight")
    with pytest.raises(MergeError):
        folded_value(weight, change)
    assert torch.equal(weight, original)


@pytest.mark.parametrize(
    "weight", [torch.zeros(6, 4, dtype=torch.int8), torch.zeros(6, 4, device="meta"), torch.tensor(1.0)]
)
def test_weights_that_hold_no_floats_are_refused(weight):
    with pytest.raises(MergeError):
        fold(weight, low_rank(6, 4, 2))


# A weight changed in between --------------------------------------------------------------------------------------


def records_of(weight: Tensor) -> dict[str, tuple[Tensor, Record]]:
    changes = {
        "record": low_rank(64, 48, 2),
        "copy": low_rank(64, 48, 2),
        "rows": Rows(torch.tensor([5]), torch.ones(1, 48)),
    }
    records = {}
    for kind, change in changes.items():
        copied = weight.clone()
        records[kind] = copied, fold(copied, change, keep="copy" if kind == "copy" else "record")
        assert records[kind][1].kind == kind
    return records


@pytest.mark.parametrize("kind", ["record", "copy", "rows"])
def test_a_changed_weight_is_noticed_before_anything_is_touched(kind):
    weight, record = records_of(weight_of(64, 48))[kind]
    merged = weight.clone()
    tampered = weight.clone()
    tampered.view(torch.int32)[17, 23] ^= 1
    for other in (tampered, weight.double(), weight[:32].clone(), weight.flip(0), weight.flip(1)):
        before = other.clone()
        with pytest.raises(MergeError, match="encoder"):
            unfold(other, record, where="encoder")
        assert torch.equal(other, before)
    with pytest.raises(MergeError):
        unfold(weight[:32].clone(), record, check=False)
    unfold(merged, record)
    assert torch.equal(merged, weight_of(64, 48))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_check_the_change_is_taken_out_of_a_trained_weight(dtype):
    original = weight_of(64, 48, dtype)
    original[0, 0] = 1e-30  # its correction is a huge difference of bits, which makes no sense for another value
    for kind, (weight, record) in records_of(original).items():
        weight += 0.25
        unfold(weight, record, check=False)
        if kind == "record":  # two roundings of entries near 1
            torch.testing.assert_close(weight, original + 0.25, rtol=0, atol=2 * torch.finfo(dtype).eps)
        elif kind == "copy":
            assert torch.equal(weight, original)
        else:
            assert torch.equal(weight[5], original[5])


def test_without_the_check_an_untouched_weight_still_comes_back_exactly():
    for weight, record in records_of(weight_of(64, 48)).values():
        unfold(weight, record, check=False)
        assert torch.equal(weight, weight_of(64, 48))


# The checksum -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*DTYPES, torch.int8, torch.bool, torch.int64, torch.complex64]),
    st.sampled_from([(), (0, 3), (1,), (7,), (8,), (5, 3), (4, 8), (33, 6), (4, 3, 2, 2)]),
    st.data(),
)
def test_the_checksum_sees_values_not_layouts(dtype, shape, data):
    tensor = torch.randint(0, 2, shape).to(dtype)
    number = checksum(tensor)
    assert 0 <= number < 2**64
    assert number == checksum(tensor.clone()) == checksum(torch.nn.Parameter(tensor, requires_grad=False))
    if tensor.dim():
        assert all(checksum(other) == number for other in layouts(tensor).values())
    if tensor.numel():
        other = tensor.clone()
        raw = other.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))].view(1).view(torch.uint8)
        raw[0] ^= 1 << (0 if dtype == torch.bool else data.draw(st.integers(0, 7)))
        assert checksum(other) != number


def test_the_checksum_sees_permutations_and_signs():
    tensor = torch.randn(70, 24, generator=torch.Generator().manual_seed(0))
    swapped = [tensor.clone() for _ in range(3)]
    swapped[0][[3, 40]] = tensor[[40, 3]]
    swapped[1][:, [2, 21]] = tensor[:, [21, 2]]
    swapped[2][:, [0, 1, 2, 3]] = tensor[:, [2, 3, 0, 1]]
    flipped = [tensor.clone() for _ in range(4)]  # signs are the top bits, and sums lose their carries
    flipped[0].neg_()
    flipped[1][:, [1, 3]] *= -1
    flipped[2][[16, 32]] *= -1
    flipped[3][2] *= -1
    swapped += flipped
    assert len({checksum(t) for t in (tensor, *swapped, tensor.flip(0), tensor.flip(1), tensor.T.contiguous())}) == 11
