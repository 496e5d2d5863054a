"""Writes one file of tensors: the header first, then each tensor at its place, in any order and from any thread."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.arithmetic.corrections import checksum
from surgery.checkpoints.shard_layout import ShardLayout, code_of
from surgery.errors import SurgeryError

__all__ = ["ShardWriter", "checksum_of", "sha256_of", "shard_checksum", "sync_folder"]

_PIECE = 1 << 30  # the most bytes of one write; Linux stops before 2 GiB
_BUFFER = 1 << 20
_ROW = 4096  # of the matrix of bytes whose checksum is taken


class ShardWriter:
    """A file of a layout. `checksums`: of each tensor that is in the file, of the bytes as they were written."""

    def __init__(self, path: Path, layout: ShardLayout):
        self.path, self.layout, self.checksums = path, layout, dict[str, int]()
        with open(path, "wb") as file:
            file.write(layout.head)
            file.truncate(layout.size)

    def write(self, key: str, tensor: Tensor) -> None:
        """Writes a tensor, whose dtype and shape are those of the layout."""
        place = self.layout.tensors[key]
        if tuple(tensor.shape) != place.shape or code_of(tensor.dtype) != place.code:
            why = f"it is {tensor.dtype} {tuple(tensor.shape)}, and the file has {place.code} {place.shape}"
            raise SurgeryError(f"a new {key} does not fit the file", where=self.path.name, why=why)
        data = tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
        if place.nbytes:
            with open(self.path, "r+b", buffering=0) as file:
                file.seek(place.start)
                _write_all(file, data.numpy().data)
        self.checksums[key] = _checksum_of_pieces(data.split(_BUFFER))

    def copy(self, source: Path, spans: Iterable[tuple[str, int]]) -> None:
        """Copies tensors from another file. A span is a key and its first byte there; neighbours are copied at once."""
        spans = list(spans)
        with open(source, "rb", buffering=0) as old, open(self.path, "r+b", buffering=0) as new:
            for start, target, count in _joined([(self.layout.tensors[key], start) for key, start in spans]):
                _copy_bytes(old, start, new, target, count)
        self.checksums |= _stored_checksums(self.path, self.layout, [key for key, _ in spans])

    def finish(self) -> str:
        """Flushes the file to the disk, and returns its `shard_checksum`. Raises if a tensor was not written."""
        if absent := self.layout.tensors.keys() - self.checksums:
            raise AssertionError(f"{self.path.name}: {sorted(absent)[:3]} were not written")
        with open(self.path, "r+b") as file:
            os.fsync(file.fileno())
        return _joined_checksum(self.layout.head, self.layout, self.checksums)


def _joined(spans: Iterable[tuple[Any, int]]) -> Iterator[tuple[int, int, int]]:
    """Joins spans that lie side by side in both files: first byte, first byte in the new file, number of bytes."""
    joined: list[tuple[int, int, int]] = []
    for place, start in sorted(spans, key=lambda span: span[1]):
        if joined and joined[-1][0] + joined[-1][2] == start and joined[-1][1] + joined[-1][2] == place.start:
            joined[-1] = (*joined[-1][:2], joined[-1][2] + place.nbytes)
        else:
            joined.append((start, place.start, place.nbytes))
    yield from joined


def _copy_bytes(old: Any, start: int, new: Any, target: int, count: int) -> None:
    """Copies bytes between files; on Linux inside the kernel."""
    if hasattr(os, "copy_file_range"):
        try:
            while count:
                done = os.copy_file_range(old.fileno(), new.fileno(), min(count, _PIECE), start, target)
                if not done:
                    break
                start, target, count = start + done, target + done, count - done
        except OSError:  # a file system without it, or two of them
            pass
    old.seek(start)
    new.seek(target)
    while count:
        piece = old.read(min(count, _BUFFER))
        if not piece:
            raise SurgeryError(
                f"{old.name} is shorter than it was", why="another program changed it", fix="run it again"
            )
        _write_all(new, memoryview(piece))
        count -= len(piece)


def _write_all(file: Any, data: memoryview) -> None:
    at = 0
    while at < len(data):
        at += file.write(data[at : at + _PIECE])


def shard_checksum(path: Path, layout: ShardLayout) -> str:
    """The checksum of a file of a layout. It tells a changed or unfinished file from what a `ShardWriter` wrote."""
    with open(path, "rb") as file:
        head = file.read(len(layout.head))
    sums = _stored_checksums(path, layout, layout.tensors)
    return _joined_checksum(head, layout, sums) if path.stat().st_size == layout.size else ""


def _joined_checksum(head: bytes, layout: ShardLayout, checksums: Mapping[str, int]) -> str:
    values = b"".join(checksums[key].to_bytes(8, "little") for key in layout.tensors)
    return hashlib.sha256(head + values).hexdigest()


def _stored_checksums(path: Path, layout: ShardLayout, keys: Collection[str]) -> dict[str, int]:
    """The checksum of each of these tensors of a file."""
    places = {key: layout.tensors[key] for key in keys}
    with open(path, "rb", buffering=0) as file:
        return {key: _checksum_of_pieces(_pieces(file, place.start, place.nbytes)) for key, place in places.items()}


def checksum_of(path: Path) -> int:
    """The checksum of a file."""
    with open(path, "rb", buffering=0) as file:
        return _checksum_of_pieces(_pieces(file, 0, path.stat().st_size))


def _pieces(file: Any, start: int, count: int) -> Iterator[Tensor]:
    """Reads bytes of a file in pieces that stay in cache, each valid until the next one. They end with the file."""
    buffer = torch.empty(min(count, _BUFFER), dtype=torch.uint8)
    view = memoryview(buffer.numpy().data)
    file.seek(start)
    while count:
        at = 0
        while at < min(count, _BUFFER) and (done := file.readinto(view[at : min(count, _BUFFER)])):
            at += done
        yield buffer[:at]
        count = count - at if at == _BUFFER else 0


def _checksum_of_pieces(pieces: Iterable[Tensor]) -> int:
    """A checksum of 64 bits of bytes in pieces of `_BUFFER`: any change of one number alters it."""
    value = 0
    for piece in pieces:
        if piece.storage_offset() % 8:  # a sum of wide numbers needs them in their places
            piece = piece.clone()
        split = len(piece) // _ROW * _ROW
        sums = checksum(piece[:split].view(-1, _ROW)), checksum(piece[split:].view(1, -1))
        value = (value * 0x9E3779B97F4A7C15 + sums[0] + 3 * sums[1]) % 2**64
    return value


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    digest, buffer = hashlib.sha256(), bytearray(_BUFFER)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk."""
    if os.name == "posix":  # Windows can't open a folder, and need not flush one
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
