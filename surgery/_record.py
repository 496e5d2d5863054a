"""What a merge keeps so that it can be undone to the bit: corrections, a copy, or rows."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from surgery._lowrank import LowRank

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Corrections are compressed once this many wait, so that a dense record can't grow large before it is packed.
_CHUNK = 1 << 18
# Rows are summed in blocks of about this many bytes: a weight in another memory layout is copied a block at a time.
_BLOCK = 1 << 23


@dataclass(eq=False)
class Record:
    """The way back from one fold; picklable, and on the CPU once pickled.

    `kind` is "record" (corrections beside the factors), "copy" (the whole original) or "rows" (the rows overwritten).
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
    # Where `kept` is the weight's own memory, exchanged for new memory: the address of the new.
    swapped_for: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes kept: factors, corrections, copy."""
        total = sum(t.numel() * t.element_size() for t in (self.index, self.kept) if t is not None)
        return total + (self.change.nbytes if self.change else 0) + (self.corrections.nbytes if self.corrections else 0)

    def __getstate__(self) -> dict[str, Any]:
        # A kept copy stays on its device for speed, but a pickle must open on a machine without that device.
        state = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        return state | {"swapped_for": None}


@dataclass(eq=False)
class Corrections:
    """Where `unfold`'s arithmetic misses the original, and by how many units in the last place.

    Positions ascend, so gaps are stored. Nine in ten differences are ±1: those store gap and sign as one number.
    """

    chunks: list[tuple[int, _Packed, _Packed, _Packed]] = field(default_factory=list)
    # NaN has no one bit pattern across devices, so what lies under one is kept as it was, not as a difference.
    nan_positions: list[Tensor] = field(default_factory=list)
    nan_bits: list[Tensor] = field(default_factory=list)
    nbytes: int = 0
    _pending: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list, repr=False)
    _count: int = 0

    def add(self, start: int, difference: Tensor) -> None:
        """Take the non-zero entries of a flat tensor of integers whose first entry is at flat position `start`."""
        flat = difference if difference.device.type == "cpu" else None
        if flat is not None:  # numpy's flatnonzero is four times as fast as torch's
            values = flat.numpy()
            positions = np.flatnonzero(values != 0)
            values = values[positions]
        else:
            found = difference.nonzero().squeeze(1)
            positions, values = found.cpu().numpy(), difference[found].cpu().numpy()
        if len(positions):
            self._pending.append((positions + start, values))
            self._count += len(positions)
        if self._count >= _CHUNK:
            self.close()

    def add_nan(self, start: int, positions: Tensor, bits: Tensor) -> None:
        """Keep `bits` themselves."""
        self.nan_positions.append((positions + start).cpu())
        self.nan_bits.append(bits.cpu())
        self.nbytes += positions.numel() * (8 + bits.element_size())

    def close(self) -> None:
        """Pack what waits."""
        if not self._pending:
            return
        positions = np.concatenate([p for p, _ in self._pending])
        values = np.concatenate([v for _, v in self._pending]).astype(np.int64)
        self._pending, self._count = [], 0
        base = int(positions[0])
        unit = np.abs(values) == 1
        rest = ~unit
        signed = _gaps(positions[unit] - base) << np.uint64(1) | (values[unit] < 0)
        streams = _pack(signed), _pack(_gaps(positions[rest] - base)), _pack(_zigzag(values[rest]))
        self.chunks.append((base, *streams))
        self.nbytes += 8 + sum(len(plane) for stream in streams for plane in stream)

    def apply(self, weight: Tensor) -> None:
        """Add the differences to the bits of `weight`, in place."""
        self.close()
        bits = weight.view(INTEGERS[weight.element_size()])
        for positions, values in self._unpacked():
            where = torch.from_numpy(positions).to(bits.device)
            bits.put_(where, torch.from_numpy(values).to(bits.device, bits.dtype), accumulate=True)
        for positions, values in zip(self.nan_positions, self.nan_bits, strict=True):
            bits.put_(positions.to(bits.device), values.to(bits.device))

    def _unpacked(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for base, signed, gaps, values in self.chunks:
            number = _unpack(signed)
            sign = 1 - 2 * (number & np.uint64(1)).astype(np.int64)
            yield base + _positions(number >> np.uint64(1)), sign
            yield base + _positions(_unpack(gaps)), _unzigzag(_unpack(values))


_Packed = tuple[bytes, ...]


def _gaps(positions: np.ndarray) -> np.ndarray:
    return np.diff(positions, prepend=0).astype(np.uint64)


def _positions(gaps: np.ndarray) -> np.ndarray:
    return np.cumsum(gaps.astype(np.int64))


def _zigzag(values: np.ndarray) -> np.ndarray:
    # 0, -1, 1, -2, … becomes 0, 1, 2, 3, …: small differences of either sign leave the upper bytes zero.
    return ((values << 1) ^ (values >> 63)).view(np.uint64)


def _unzigzag(numbers: np.ndarray) -> np.ndarray:
    return ((numbers >> np.uint64(1)) ^ (np.uint64(0) - (numbers & np.uint64(1)))).view(np.int64)


def _pack(numbers: np.ndarray) -> _Packed:
    """Byte planes, lowest first, as many as the largest number needs, each compressed."""
    planes = max(1, (int(numbers.max()).bit_length() + 7) // 8) if len(numbers) else 0
    return tuple(_compress((numbers >> np.uint64(8 * k)).astype(np.uint8)) for k in range(planes))


def _unpack(planes: _Packed) -> np.ndarray:
    parts = [np.frombuffer(zlib.decompress(plane), np.uint8).astype(np.uint64) for plane in planes]
    return sum(
        (part << np.uint64(8 * k) for k, part in enumerate(parts)), np.zeros(len(parts[0]) if parts else 0, np.uint64)
    )


def _compress(plane: np.ndarray) -> bytes:
    # Neighbouring bytes say nothing of each other, so searching for repeats (zlib's slow part) finds none.
    coder = zlib.compressobj(1, zlib.DEFLATED, 9, 8, zlib.Z_RLE)
    return coder.compress(plane.tobytes()) + coder.flush()


def checksum(tensor: Tensor) -> int:
    """A 64-bit number of the raw bits: equal on every device, memory layout and number of threads.

    >>> weight = torch.zeros(2, 3)
    >>> checksum(weight) == checksum(weight.clone()) != checksum(-weight)
    True

    Every bit counts, and so does the place of each row. Places inside a row are told apart in every sixteenth row only
    (enough to notice permuted columns): weighing each entry would cost several times as much. It is made to catch
    training, loading and editing, not an attacker.
    """
    tensor = tensor.detach()
    if not tensor.numel():
        return 0
    rows = tensor.reshape(1, 1) if tensor.dim() == 0 else tensor
    step = max(16, _BLOCK // (rows[0].numel() * rows.element_size()) // 16 * 16)
    lanes = [_lanes(rows[i : i + step]) for i in range(0, len(rows), step)]
    sums = [lane.sum(1, dtype=torch.int64) for lane in lanes]
    samples = [lane[::16].sum(0, dtype=torch.int64) for lane in lanes]
    total = _weighted(torch.cat(sums), 0) + _weighted(torch.stack(samples).sum(0), len(rows))
    return total % 2**64


def _lanes(rows: Tensor) -> Tensor:
    """The rows' bits as a matrix of integers, as wide as their length allows."""
    matrix = rows.reshape(len(rows), -1).contiguous()
    if matrix.is_complex() or matrix.dtype == torch.bool:
        matrix = matrix.view(torch.uint8)
    nbytes = matrix.shape[1] * matrix.element_size()
    return matrix.view(INTEGERS[8 if nbytes % 8 == 0 else matrix.element_size()])


def _weighted(sums: Tensor, place: int) -> int:
    return int(np.dot(sums.cpu().numpy(), _multipliers(place + len(sums))[place:]))


@lru_cache(maxsize=64)
def _multipliers(count: int) -> np.ndarray:
    """Odd numbers, one a place: an odd factor loses no bit modulo 2⁶⁴."""
    place = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((place ^ (place >> np.uint64(29))) | np.uint64(1)).view(np.int64)
