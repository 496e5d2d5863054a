"""Compares two tensors of files piece by piece, so the memory does not depend on their sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.adapter_files.tensor_headers import TensorHeader

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.adapter_files.tensor_files import TensorFile

__all__ = ["Comparison", "Place", "compare_tensors", "norm_of"]

_PIECE = 1 << 20  # entries that are in memory at once, in float64


@dataclass(frozen=True)
class Place:
    """A tensor in a file."""

    file: Path
    key: str
    header: TensorHeader


@dataclass(frozen=True)
class Comparison:
    """The norms of two tensors and of their difference. `same`: all entries are equal; NaN equals NaN."""

    norm_a: float
    norm_b: float
    difference: float
    same: bool


def norm_of(place: Place) -> float:
    """The Frobenius norm of a tensor."""
    return math.hypot(*[float(piece.norm()) for piece in _pieces(place)])


def compare_tensors(a: Place, b: Place) -> Comparison:
    """Compares two tensors of one shape."""
    norms, same = [0.0, 0.0, 0.0], True
    for x, y in zip(_pieces(a), _pieces(b), strict=True):
        same = same and bool((x == y).logical_or(x.isnan() & y.isnan()).all())
        for index, piece in enumerate((x, y, y - x)):
            norms[index] = math.hypot(norms[index], float(piece.norm()))
    return Comparison(norms[0], norms[1], norms[2], same)


def _pieces(place: Place) -> Iterator[Tensor]:
    """Yields the entries in their order, in float64 or complex128."""
    import torch

    flat = _opened(place.file, place.file.stat().st_mtime_ns).read(place.key).reshape(-1)
    dtype = torch.complex128 if flat.is_complex() else torch.float64
    for start in range(0, max(1, flat.numel()), _PIECE):
        yield flat[start : start + _PIECE].to(dtype)


@lru_cache(maxsize=256)
def _opened(file: Path, _: int) -> TensorFile:
    """A file of tensors, which is mapped and read where it is needed. The header is read once."""
    from surgery.adapter_files.tensor_files import open_tensors

    return open_tensors(file)
