"""The records with which a merge is undone bit for bit: corrections, a copy, or rows."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from surgery.arithmetic.low_rank import LowRank

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# The number of corrections that are packed at a time, so that arrays stay in cache and a dense record stops early.
_CHUNK = 1 << 15
_FEW = 1 << 10  # up to this number, corrections are not compressed


@dataclass(eq=False)
class Record:
    """The record of one fold, with which `unfold` restores the weight. Pickling moves it to the CPU.

    `kind`: "record" has the factors and corrections, "copy" the whole original, "rows" the overwritten rows.
    """

    kind: Literal["record", "copy", "rows"]
    shape: torch.Size
    dtype: torch.dtype
    after: int
    before: int | None = None
    change: LowRank | None = None
    corrections: Corrections | None = None
    index: Tensor | None = None
    kept: Tensor | None = None
    # If `kept` is the weight's former memory: the address of the new memory.
    swapped_for: int | None = None
    # ‖ΔW‖, and the norm of what rounding to the weight's dtype lost. None: a rule gave a value that is rounded already.
    norm: float | None = None
    error: float | None = None
    nearest: bool = True  # whether the sum is rounded to the nearest number, as `new_value` computes it again

    @property
    def nbytes(self) -> int:
        """The size of the record in bytes: factors, corrections, copy."""
        total = sum(t.numel() * t.element_size() for t in (self.index, self.kept) if t is not None)
        return total + (self.change.nbytes if self.change else 0) + (self.corrections.nbytes if self.corrections else 0)

    def __getstate__(self) -> dict[str, Any]:
        # A copy stays on its device for speed, but a pickle must load on a machine without that device.
        state = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        return state | {"swapped_for": None}


@dataclass(eq=False)
class Corrections:
    """The positions at which `unfold`'s arithmetic does not give the original bits, with the integer differences.

    Positions ascend, so only gaps are stored, each with the sign of its difference as the lowest bit. Nine in ten
    differences are ±1. The sizes of the others are stored separately, with the gaps between them.
    """

    chunks: list[_Chunk] = field(default_factory=list)
    # The bit pattern of NaN differs between devices, so entries under a NaN are stored as bits, not as differences.
    nan_positions: list[Tensor] = field(default_factory=list)
    nan_bits: list[Tensor] = field(default_factory=list)
    nbytes: int = 0
    _pending: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list, repr=False)

    @staticmethod
    def of(positions: np.ndarray, values: np.ndarray) -> Corrections:
        """Create the corrections of a small weight at once."""
        corrections = Corrections()
        if len(positions):
            corrections._pending.append((positions, values))
            corrections.close()
        return corrections

    @staticmethod
    def of_many(positions: np.ndarray, values: np.ndarray, bounds: Sequence[int], size: int) -> list[Corrections]:
        """Create the corrections of many small weights with `size` entries each.

        Weight k has the entries `bounds[k]:bounds[k + 1]`. `positions` continue from weight to weight.
        """
        corrections = [Corrections() for _ in bounds[1:]]
        few = [k for k in range(len(corrections)) if 0 < bounds[k + 1] - bounds[k] <= _FEW]
        if few:
            chosen = [(bounds[k], bounds[k + 1], k * size) for k in few]
            for k, chunk in zip(few, _pack_few(positions, values, chosen), strict=True):
                corrections[k].chunks.append(chunk)
                corrections[k].nbytes = 8 + len(chunk[-1])
        for k in set(range(len(corrections))).difference(few):
            start, end = bounds[k], bounds[k + 1]
            corrections[k] = Corrections.of(positions[start:end] - k * size, values[start:end])
        return corrections

    def add(self, start: int, want: Tensor, got: Tensor) -> None:
        """Add the differences between two flat tensors of bits. `start` is the position of the first entry."""
        if want.device.type == "cpu":  # numpy is four times as fast as torch
            wanted_bits, got_bits = want.numpy(), got.numpy()
            positions = nonzero(wanted_bits != got_bits)
            values = wanted_bits[positions] - got_bits[positions]
        else:
            differing = (want != got).nonzero().squeeze(1)
            positions = differing.cpu().numpy()
            values = (want[differing] - got[differing]).cpu().numpy()
        if len(positions):
            self._pending.append((positions + start, values))
        if sum(len(p) for p, _ in self._pending) >= _CHUNK:
            self.close()

    def add_nan(self, start: int, positions: Tensor, bits: Tensor) -> None:
        """Store the bits themselves."""
        self.nan_positions.append((positions + start).cpu())
        self.nan_bits.append(bits.cpu())
        self.nbytes += positions.numel() * (8 + bits.element_size())

    def close(self) -> None:
        """Pack the pending corrections."""
        if self._pending:
            positions, values = (np.concatenate(part) for part in zip(*self._pending, strict=True))
            for i in range(0, len(positions), _CHUNK):
                self.chunks.append(_pack(positions[i : i + _CHUNK], values[i : i + _CHUNK]))
                self.nbytes += 8 + len(self.chunks[-1][-1])
            self._pending = []

    def apply(self, weight: Tensor) -> None:
        """Add the differences to the bits of `weight`, in place."""
        bits = weight.view(INTEGERS[weight.element_size()])
        for chunk in self.chunks:
            positions, values = (torch.from_numpy(part).to(bits.device) for part in _unpack(*chunk))
            bits.put_(positions, values.to(bits.dtype), accumulate=True)
        for positions, bits_under_nan in zip(self.nan_positions, self.nan_bits, strict=True):
            bits.put_(positions.to(bits.device), bits_under_nan.to(bits.device))


# First position; number of values and byte planes of each stream; number of uncompressed bytes; the bytes.
_Chunk = tuple[int, tuple[tuple[int, int], ...], int, bytes]


def _pack(positions: np.ndarray, values: np.ndarray) -> _Chunk:
    base, sizes = int(positions[0]), np.abs(values)
    larger = np.flatnonzero(sizes != 1)
    planes, header = [], []
    for stream in (_gaps(positions, base) << 1 | (values < 0), _gaps(larger, 0), sizes[larger].astype(np.int64)):
        top = int(stream.view(np.uint64).max()) if len(stream) else 0
        header.append((len(stream), (top.bit_length() + 7) // 8))
        planes += [(stream >> 8 * k).astype(np.uint8) for k in range(header[-1][1])]
    # The low bytes of long gaps are nearly random: compressing them would take time and save little.
    plain = planes.pop(0).tobytes() if header[0][1] and positions[-1] - base > 12 * len(positions) else b""
    # Neighbouring bytes are independent, so zlib's slow search for repeats is disabled.
    if len(positions) <= _FEW:  # creating a coder would take longer than all the rest
        rest = b"".join([plain, *(plane.tobytes() for plane in planes)])
        return base, tuple(header), len(rest), rest
    coder = zlib.compressobj(1, zlib.DEFLATED, 15, 8, zlib.Z_RLE)
    return base, tuple(header), len(plain), b"".join([plain, *map(coder.compress, planes), coder.flush()])


def _pack_few(positions: np.ndarray, values: np.ndarray, chosen: Sequence[tuple[int, int, int]]) -> list[_Chunk]:
    """Like `_pack` for many slices without compression. A slice is (start, end, offset of its positions)."""
    sizes = np.abs(values)
    larger = np.flatnonzero(sizes != 1)
    starts = np.array([start for start, *_ in chosen])
    inner = np.searchsorted(larger, [[start, end] for start, end, _ in chosen]).tolist()
    with_larger = [(start, first) for (start, *_), (first, last) in zip(chosen, inner, strict=True) if first < last]
    gaps, inner_gaps = _gaps(positions, 0), _gaps(larger, 0)
    gaps[starts] = 0
    if with_larger:
        begins, firsts = np.array(with_larger).T
        inner_gaps[firsts] = larger[firsts] - begins
    streams = (gaps << 1 | (values < 0), inner_gaps, sizes[larger].astype(np.int64))
    first, *others = map(_Planes, streams)
    chunks: list[_Chunk] = []
    for (start, end, offset), (low, high) in zip(chosen, inner, strict=True):
        parts = [first.part(start, end), *(other.part(low, high) for other in others)]
        packed = b"".join([plane for _, planes in parts for plane in planes])
        header = tuple([(length, len(planes)) for length, planes in parts])
        chunks.append((int(positions[start]) - offset, header, len(packed), packed))
    return chunks


class _Planes:
    """The byte planes of integers, lowest first. A slice has as many planes as its largest number needs."""

    def __init__(self, stream: np.ndarray):
        top = int(stream.view(np.uint64).max()) if len(stream) else 0
        self.planes = [(stream >> 8 * k).astype(np.uint8).tobytes() for k in range((top.bit_length() + 7) // 8)]

    def part(self, start: int, end: int) -> tuple[int, list[bytes]]:
        planes = [plane[start:end] for plane in self.planes]
        while planes and not any(planes[-1]):
            planes.pop()
        return end - start, planes


def _unpack(base: int, header: tuple[tuple[int, int], ...], plain: int, packed: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions and values of a chunk."""
    rest = zlib.decompress(packed[plain:]) if len(packed) > plain else b""
    data, streams, start = np.frombuffer(packed[:plain] + rest, np.uint8), [], 0
    for length, count in header:
        stream = np.zeros(length, np.int64)
        for k in range(count):
            stream |= data[start : start + length].astype(np.int64) << 8 * k
            start += length
        streams.append(stream)
    signed, larger, sizes = streams
    values = 1 - ((signed & 1) << 1)
    values[np.cumsum(larger)] *= sizes
    return np.cumsum(signed >> 1) + base, values


def _gaps(positions: np.ndarray, base: int) -> np.ndarray:
    gaps = positions - base
    gaps[1:] -= gaps[:-1].copy()
    return gaps


def nonzero(mask: np.ndarray) -> np.ndarray:
    """Like np.flatnonzero, but in two steps for masks with 2 to 10 % hits, where branch prediction fails most."""
    if not 0.02 < np.count_nonzero(mask) / mask.size < 0.1:
        return np.flatnonzero(mask)
    eights = np.packbits(mask)
    with_hits = np.flatnonzero(eights != 0)
    inner = np.flatnonzero(np.unpackbits(eights[with_hits]).view(np.bool_))
    return (with_hits[inner >> 3] << 3) | (inner & 7)


def checksum(tensor: Tensor) -> int:
    """Compute a 64-bit checksum of the raw bits, independent of device, memory layout and number of threads.

    >>> weight = torch.zeros(2, 3)
    >>> checksum(weight) == checksum(weight.clone()) != checksum(-weight)
    True

    It depends on every bit and on the order of rows. The order inside a row counts only in every sixteenth row, which
    is enough to detect permuted columns; weighting each entry would cost several times as much. It detects training,
    loading and editing, not attacks.
    """
    tensor = tensor.detach()
    if not tensor.numel():
        return 0
    matrix = tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1)
    if not matrix.is_contiguous() or matrix.stride(1) != 1:  # a single entry is contiguous at any stride
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    if matrix.is_complex() or matrix.dtype == torch.bool:
        matrix = matrix.view(torch.uint8)
    width = matrix.element_size()
    lanes = matrix.view(INTEGERS[8 if matrix.shape[1] * width % 8 == 0 else width])
    # Sums of wide lanes are fast, but lose carries out of the top bit, a sign, so the sample has narrow lanes.
    sample = matrix[::16].view(INTEGERS[min(width, 4)])
    rows, columns = lanes.sum(1, dtype=torch.int64), sample.sum(0, dtype=torch.int64)
    sums, m = torch.cat([rows, columns]).cpu().numpy(), len(rows)
    factors = _multipliers(len(sums))
    # The second sum is doubled, because two odd multiples of a changed bit might cancel.
    return (int(np.dot(sums[:m], factors[:m])) + 2 * int(np.dot(sums[m:], factors[m:]))) % 2**64


def checksums(stack: Tensor) -> list[int]:
    """Returns the `checksum` of each matrix in a stack (k, m, n)."""
    width = stack.element_size()
    lanes = stack.view(INTEGERS[8 if stack.shape[2] * width % 8 == 0 else width])
    sample = stack[:, ::16].view(INTEGERS[min(width, 4)])
    rows, columns = lanes.sum(2, dtype=torch.int64), sample.sum(1, dtype=torch.int64)
    sums, m = torch.cat([rows, columns], 1).numpy(), rows.shape[1]
    factors = _multipliers(sums.shape[1])
    first, second = (sums[:, :m] * factors[:m]).sum(1), (sums[:, m:] * factors[m:]).sum(1)
    return [(a + 2 * b) % 2**64 for a, b in zip(first.tolist(), second.tolist(), strict=True)]


@lru_cache(maxsize=16)
def _multipliers(count: int) -> np.ndarray:
    """Returns an odd number for each place: an odd factor does not lose bits modulo 2⁶⁴."""
    place = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((place ^ (place >> np.uint64(29))) | np.uint64(1)).view(np.int64)
