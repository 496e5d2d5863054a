"""The arithmetic of an exact merge: fold a change into a weight in place, and get the weight's bits back later.

Adding ΔW and subtracting it again rounds twice, so some entries come back different. They are few: `fold` computes what
`unfold` will get and keeps the differences. This needs a ΔW that is the same whenever and wherever it is computed, which
a floating-point matmul is not (threads, device, BLAS). So the factors are rounded to integers, times powers of two, small
enough that every product and every partial sum is an integer float64 holds: no order of summation can change the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from surgery._record import INTEGERS, Corrections, Record, checksum
from surgery.errors import MergeError

__all__ = ["Change", "LowRank", "Record", "Rows", "checksum", "fold", "folded", "unfold"]

# Beyond 2^±500, sums of products would leave float64's exponents: larger factors are not folded with a record, smaller
# ones are rounded to this grid.
_LARGEST, _SMALLEST = 2.0**500, 2.0**-500


@dataclass(frozen=True, eq=False)
class LowRank:
    """W' = gain ⊙ (W + ΔW) with ΔW = (B · scale) @ A, reshaped to the weight's shape.

    >>> change = LowRank(B=torch.ones(3, 2), A=torch.ones(2, 4), scale=0.5)
    >>> change.delta((3, 4))[0]
    tensor([1., 1., 1., 1.])

    B is (m, r) and A is (r, n) for a weight of m rows with n entries each, in any floating dtypes. `scale` is a number or
    one per rank component, (r,). With `groups` g (grouped convolution) B is (m, r/g), and the j-th block of m/g rows is
    B_j @ A_j with A_j the j-th r/g rows of A. `gain` is (m,), one per row, or anything that broadcasts to the weight.
    """

    B: Tensor
    A: Tensor
    scale: float | Tensor = 1.0
    groups: int = 1
    gain: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def delta(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """ΔW, the same bits for any device, number of threads and order of the rank components.

        float64 where asked for (relative error about 1e-15), else float32 (about 1e-7 of the largest products).
        """
        self.check(shape)
        product = _Product(self, shape, dtype, self.B.device)
        out = torch.empty(product.rows, product.width, dtype=product.compute, device=self.B.device)
        for i, j in product.tiles():
            out[i:j] = product(i, j)
        return out.reshape(tuple(shape))

    @staticmethod
    def join(changes: Sequence[LowRank]) -> LowRank:
        """Several changes as one, concatenated along the rank, so that they are rounded once."""
        if any(change.groups != 1 or change.gain is not None for change in changes):
            raise MergeError("grouped or scaled changes can't be joined", fix="fold them one after the other")
        scales = [torch.as_tensor(c.scale, dtype=torch.float64, device=c.B.device).expand(len(c.A)) for c in changes]
        return LowRank(torch.cat([c.B for c in changes], 1), torch.cat([c.A for c in changes]), torch.cat(scales))

    def check(self, shape: Sequence[int], where: str = "") -> None:
        """Raise a MergeError unless the factors fit a weight of this shape."""
        m, n = _matrix_shape(shape)
        (rows, rank), g = self.B.shape, self.groups
        if rows != m or tuple(self.A.shape) != (rank * g, n) or rank < 1 or m % g:
            raise MergeError(
                f"a weight of shape {tuple(shape)} can't take factors {tuple(self.B.shape)} and {tuple(self.A.shape)}",
                where=where or None,
                why=f"B must be ({m}, r/{g}) and A (r, {n}), with r at least {g}" if g > 1 else f"B must be ({m}, r) and A (r, {n})",
            )

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def snapshot(self) -> LowRank:
        """A copy on the CPU that no later training reaches."""
        return replace(self, **{name: t.detach().to("cpu", copy=True) for name, t in self._tensors().items()})


@dataclass(frozen=True, eq=False)
class Rows:
    """weight[index] = values: only the rows overwritten are kept. index (k,) int64, values (k, …)."""

    index: Tensor
    values: Tensor


Change = LowRank | Rows | Tensor


def fold(weight: Tensor, change: Change, *, keep: Literal["record", "copy"] = "record", where: str = "") -> Record:
    """Fold `change` into `weight` in place; the Record it returns is the way back.

    >>> weight = torch.randn(64, 32)
    >>> before = weight.clone()
    >>> record = fold(weight, LowRank(torch.randn(64, 4), torch.randn(4, 32)))
    >>> unfold(weight, record)
    >>> torch.equal(weight, before)
    True

    `change`: a LowRank; Rows; or a tensor, the weight's new value. float16, bfloat16 and float32 weights compute in
    float32 and round once, float64 in float64. `keep="record"` keeps corrections for the few entries that arithmetic
    alone would miss, or a copy where that is smaller (see `Record.kind`); `keep="copy"` always keeps a copy, is several
    times as fast, and adds an ordinary float32 matmul. `where` names the weight in errors. Raises MergeError, with the
    weight untouched, where shapes or dtypes don't fit.
    """
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        _refuse(weight, change, where)
        if isinstance(change, Rows):
            index = change.index.to(weight.device)
            kept = weight[index].cpu()
            weight[index] = change.values.to(weight.device, weight.dtype)
            return Record("rows", weight.shape, weight.dtype, checksum(weight), index=index.cpu(), kept=kept)
        if isinstance(change, Tensor):
            return _fold_copy(weight, torch.empty_like(weight).copy_(change))
        if weight.numel() and keep == "record":
            work = _workplace(weight)
            if record := _fold_record(work, change):
                if work is not weight:
                    weight.copy_(work)
                return record
            return _fold_copy(weight, _new_value(weight, change))
        return _fold_copy(weight, _new_value(weight, change, exact=False))


def unfold(weight: Tensor, record: Record, *, check: bool = True, where: str = "") -> None:
    """Undo a fold in place, to the bit.

    With `check`, raises MergeError, the weight untouched, if its bits are not those the fold wrote. Without, a changed
    weight has ΔW subtracted (to within rounding), or gets its kept copy or rows back.
    """
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        intact = _intact(weight, record, check, where)
        if record.kind == "rows":
            assert record.index is not None and record.kept is not None
            weight[record.index.to(weight.device)] = record.kept.to(weight.device, weight.dtype)
        elif record.kind == "copy":
            _restore_copy(weight, record, where)
        else:
            assert record.change is not None and record.corrections is not None
            work = _workplace(weight)
            _subtract(work, record.change, _Product(record.change, work.shape, work.dtype, work.device))
            if intact:
                record.corrections.apply(work.detach())
            if work is not weight:
                weight.copy_(work)
            if check and checksum(weight) != record.before:
                raise MergeError(
                    "the weight did not come back to its original bits",
                    where=where or None,
                    why="this machine rounds differently from the one that merged (denormals flushed to zero?)",
                    fix="load the base weights again, or merge with keep='copy'",
                )


def folded(weight: Tensor, change: Change) -> Tensor:
    """What `fold` would write, without writing it."""
    with torch.no_grad():
        _refuse(weight, change, "")
        if isinstance(change, LowRank):
            return _new_value(weight, change)
        new = weight.detach().clone()
        if isinstance(change, Rows):
            new[change.index.to(new.device)] = change.values.to(new.device, new.dtype)
            return new
        return new.copy_(change)


class _Product:
    """ΔW by row tiles: exact integer arithmetic where `exact`, an ordinary matmul where not."""

    def __init__(self, change: LowRank, shape: Sequence[int], dtype: torch.dtype, device: torch.device, exact: bool = True):
        (self.rows, self.width), g = _matrix_shape(shape), change.groups
        self.compute = torch.float64 if dtype == torch.float64 else torch.float32
        work = torch.float64 if exact else self.compute
        self.B = change.B.detach().to(device, work).reshape(g, self.rows // g, -1)
        self.A = change.A.detach().to(device, work).reshape(g, -1, self.width)
        if isinstance(change.scale, Tensor):
            scale = change.scale.detach().to(device, work)
            self.B = self.B * (scale.reshape(g, 1, -1) if scale.dim() else scale)
        elif change.scale != 1:
            self.B = self.B * change.scale
        self.exact = exact and bool(self.rows and self.width) and _bounded(self.B) and _bounded(self.A)
        if self.exact:
            slices = 2 if dtype == torch.float64 else 1
            bits = (53 - (self.A.shape[1] - 1).bit_length()) // 2
            self.terms = [(b, a) for b in _slices(self.B, 2, bits, slices) for a in _slices(self.A, 1, bits, slices)]
        else:
            self.terms = [(self.B, self.A)]

    def __call__(self, i: int, j: int) -> Tensor:
        """Rows i to j of ΔW, a (j - i, n) matrix in the compute dtype; whole groups where there are several."""
        g, per_group = self.B.shape[:2]
        if g == 1:
            parts = [torch.mm(b[0, i:j], a[0]) for b, a in self.terms]
        else:
            groups = slice(i // per_group, j // per_group)
            parts = [torch.bmm(b[groups], a[groups]).flatten(0, 1) for b, a in self.terms]
        # The terms are exact one by one; their sum is rounded, always in this order.
        return sum(parts[1:], parts[0]).to(self.compute)

    def tiles(self) -> Iterator[tuple[int, int]]:
        # A tile and its temporaries stay in a CPU's second-level cache; on a GPU a tile must be worth the kernel launches.
        entries = 1 << 15 if self.B.device.type == "cpu" else 1 << 23
        step = max(1, entries // max(1, self.width))
        if len(self.B) > 1:
            step = max(1, step // self.B.shape[1]) * self.B.shape[1]
        for i in range(0, self.rows, step):
            yield i, min(i + step, self.rows)


def _bounded(factor: Tensor) -> bool:
    return bool(factor.abs().max() < _LARGEST)  # False for NaN


def _slices(factor: Tensor, dim: int, bits: int, count: int) -> list[Tensor]:
    """`count` summands of the factor, each an integer of at most `bits` bits times a power of two common to `dim`."""
    out = []
    for _ in range(count):
        top = factor.abs().amax(dim, keepdim=True).clamp_min_(_SMALLEST)
        power = (top.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)  # 2^⌊log₂ top⌋
        # Adding 1.5 · 2⁵² units leaves no bits below the unit; subtracting it again is exact.
        shift = power * (1.5 * 2.0 ** (53 - bits))
        out.append((factor + shift).sub_(shift))
        factor = factor - out[-1]
    return out


def _fold_record(weight: Tensor, change: LowRank) -> Record | None:
    """Fold with corrections, or None, the weight as it was, where they would take more room than a copy."""
    change = change.snapshot()
    budget = weight.numel() * weight.element_size() - change.nbytes
    product = _Product(change, weight.shape, weight.dtype, weight.device)
    if budget <= 0 or not product.exact:
        return None
    weight = weight.detach()
    before, corrections = checksum(weight), Corrections()
    gain, inverse = _gains(change, weight)
    integers = INTEGERS[weight.element_size()]
    for i, j in product.tiles():
        delta, rows = product(i, j), weight[i:j]
        old = rows.reshape(delta.shape)
        new = _add(old, delta, gain, i, j)
        back = _undo(new, delta, inverse, i, j)
        difference = old.view(integers) - back.to(weight.dtype).view(integers)
        if bool(back.sum().isnan()):
            nan = back.isnan()
            difference[nan] = 0
            corrections.add_nan(i * product.width, nan.flatten().nonzero().squeeze(1), old.view(integers)[nan])
        corrections.add(i * product.width, difference.flatten())
        rows.copy_(new.view(rows.shape))
        if corrections.nbytes > budget:
            break
    else:
        corrections.close()
        if corrections.nbytes <= budget:
            args = checksum(weight), before, change, corrections
            return Record("record", weight.shape, weight.dtype, *args)
    _subtract(weight, change, product, stop=j)
    corrections.apply(weight)
    return None


def _subtract(weight: Tensor, change: LowRank, product: _Product, stop: int | None = None) -> None:
    weight = weight.detach()
    _, inverse = _gains(change, weight)
    for i, j in product.tiles():
        if stop is not None and i >= stop:
            return
        delta, rows = product(i, j), weight[i:j]
        rows.copy_(_undo(rows.reshape(delta.shape), delta, inverse, i, j).view(rows.shape))


def _add(rows: Tensor, delta: Tensor, gain: Tensor | None, i: int, j: int) -> Tensor:
    total = rows + delta
    if gain is not None:
        total *= gain[i:j].reshape(delta.shape)
    return total.to(rows.dtype)


def _undo(rows: Tensor, delta: Tensor, inverse: Tensor | None, i: int, j: int) -> Tensor:
    if inverse is not None:
        rows = rows * inverse[i:j].reshape(delta.shape)
    return rows - delta


def _gains(change: LowRank, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gain, and the number that undoes it as nearly as rounding lets it, shaped like the weight."""
    if change.gain is None:
        return None, None
    gain = change.gain.detach().to(weight.device, torch.float64)
    if gain.dim() == 1 and len(gain) == len(weight):
        gain = gain.view(-1, *[1] * (weight.dim() - 1))
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    gain = gain.to(compute)
    inverse = (1 / gain.double()).to(compute)
    inverse = torch.where(inverse.isfinite(), inverse, 0)
    return gain.expand(weight.shape), inverse.expand(weight.shape)


def _new_value(weight: Tensor, change: LowRank, exact: bool = True) -> Tensor:
    source = weight.detach()
    product = _Product(change, source.shape, source.dtype, source.device, exact)
    gain, _ = _gains(change, source)
    new = torch.empty_like(source)
    if not exact and source.dtype == product.compute and gain is None and change.groups == 1 and source.is_contiguous():
        # `out=` keeps autocast away.
        torch.addmm(source.view(product.rows, -1), product.B[0], product.A[0], out=new.view(product.rows, -1))
        return new
    for i, j in product.tiles():
        delta = product(i, j)
        new[i:j] = _add(source[i:j].reshape(delta.shape), delta, gain, i, j).view(new[i:j].shape)
    return new


def _fold_copy(weight: Tensor, new: Tensor) -> Record:
    after, swap = checksum(new), _owns_storage(weight)
    kept = weight.data if swap else weight.detach().clone()
    if swap:
        weight.data = new
    else:
        weight.copy_(new)
    return Record("copy", weight.shape, weight.dtype, after, kept=kept, swapped=swap)


def _restore_copy(weight: Tensor, record: Record, where: str) -> None:
    kept = record.kept
    if kept is None:
        raise MergeError("this merge is already undone", where=where or None, why="its record was used before")
    if record.swapped and _owns_storage(weight) and (kept.device, kept.dtype) == (weight.device, weight.dtype):
        weight.data, record.kept = kept, None
    else:
        weight.copy_(kept)


def _owns_storage(weight: Tensor) -> bool:
    """Whether nothing but `weight` sees its memory, so that exchanging the memory goes unnoticed."""
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.is_shared():
        return False
    storage = weight.untyped_storage()
    # The only count of a storage's holders is private to torch; 2 are the weight and this function's handle.
    holders = getattr(torch._C, "_storage_Use_Count", lambda _: 3)(storage._cdata)
    return holders == 2 and weight.numel() * weight.element_size() == storage.nbytes()


def _workplace(weight: Tensor) -> Tensor:
    return weight.detach().cpu() if weight.device.type == "mps" else weight  # mps has no float64


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _intact(weight: Tensor, record: Record, check: bool, where: str) -> bool:
    same = weight.dtype == record.dtype and weight.shape == record.shape and checksum(weight) == record.after
    if weight.shape != record.shape or (check and not same):
        now, then = (f"{t.dtype} {tuple(t.shape)}" for t in (weight, record))
        raise MergeError(
            "the weight was changed while it was merged",
            where=where or None,
            why="its bits are not those the merge wrote (training, loading, editing)"
            if now == then
            else f"it is {now} and was {then}",
            fix="unmerge(model, check=False) to take the change out as well as rounding allows, or load the base weights again",
        )
    return same


def _refuse(weight: Tensor, change: Change, where: str) -> None:
    def error(why: str) -> MergeError:
        return MergeError("the change can't be folded into the weight", where=where or None, why=why)

    if weight.is_meta or weight.layout != torch.strided:
        raise error("the weight has no plain memory to write to (meta or sparse)")
    if isinstance(change, LowRank):
        if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise error(f"the weight is {weight.dtype}: low-rank changes need float16, bfloat16, float32 or float64")
        change.check(weight.shape, where)
    elif isinstance(change, Rows):
        index, m = change.index, weight.shape[0] if weight.dim() else 0
        if index.dim() != 1 or change.values.shape != (len(index), *weight.shape[1:]):
            raise error(f"rows {tuple(index.shape)} with values {tuple(change.values.shape)} for {tuple(weight.shape)}")
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= m or len(index.unique()) < len(index)):
            raise error(f"row numbers must differ from each other and lie in 0 … {m - 1}")
    elif change.shape != weight.shape:
        raise error(f"the weight is {tuple(weight.shape)}, its new value {tuple(change.shape)}")
