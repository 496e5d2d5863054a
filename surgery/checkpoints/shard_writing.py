"""Writes one file of tensors: the header first, then each tensor at its place, in any order and from any thread."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoints.shard_layout import ShardLayout, code_of
from surgery.errors import SurgeryError

__all__ = ["ShardWriter", "checksum_of", "copy_bytes", "sync_folder"]

_PIECE = 1 << 30  # the most bytes of one write; Linux stops before 2 GiB
_BUFFER = 1 << 20


class ShardWriter:
    """A file of a layout. `written`: the keys whose values are in the file."""

    def __init__(self, path: Path, layout: ShardLayout):
        self.path, self.layout, self.written = path, layout, set[str]()
        with open(path, "wb") as file:
            file.write(layout.head)
            file.truncate(layout.size)

    def write(self, key: str, tensor: Tensor) -> None:
        """Writes a tensor, whose dtype and shape are those of the layout."""
        place = self.layout.tensors[key]
        if tuple(tensor.shape) != place.shape or code_of(tensor.dtype) != place.code:
            why = f"it is {tensor.dtype} {tuple(tensor.shape)}, and the file has {place.code} {place.shape}"
            raise SurgeryError(f"a new {key} does not fit the file", where=self.path.name, why=why)
        if place.nbytes:
            data = tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy()
            with open(self.path, "r+b", buffering=0) as file:
                file.seek(place.start)
                _write_all(file, data.data)
        self.written.add(key)

    def copy(self, source: Path, spans: Iterable[tuple[str, int]]) -> None:
        """Copies tensors from another file. A span is a key and its first byte there; neighbours are copied at once."""
        spans = list(spans)
        with open(source, "rb", buffering=0) as old, open(self.path, "r+b", buffering=0) as new:
            for start, target, count in _joined([(self.layout.tensors[key], start) for key, start in spans]):
                copy_bytes(old, start, new, target, count)
        self.written.update(key for key, _ in spans)

    def finish(self) -> None:
        """Flushes the file to the disk. Raises if a tensor was not written."""
        if absent := self.layout.tensors.keys() - self.written:
            raise AssertionError(f"{self.path.name}: {sorted(absent)[:3]} were not written")
        with open(self.path, "r+b") as file:
            os.fsync(file.fileno())


def _joined(spans: Iterable[tuple[Any, int]]) -> Iterator[tuple[int, int, int]]:
    """Joins spans that lie side by side in both files: first byte, first byte in the new file, number of bytes."""
    joined: list[tuple[int, int, int]] = []
    for place, start in sorted(spans, key=lambda span: span[1]):
        if joined and joined[-1][0] + joined[-1][2] == start and joined[-1][1] + joined[-1][2] == place.start:
            joined[-1] = (*joined[-1][:2], joined[-1][2] + place.nbytes)
        else:
            joined.append((start, place.start, place.nbytes))
    yield from joined


def copy_bytes(old: Any, start: int, new: Any, target: int, count: int) -> None:
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


def checksum_of(path: Path, digest: Any = None) -> str:
    """The CRC-32 of a file, or the digest of a hash of hashlib, in pieces that stay in cache."""
    value, buffer = 0, bytearray(_BUFFER)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if digest is None:
                value = zlib.crc32(view[:count], value)
            else:
                digest.update(view[:count])
    return f"{value:08x}" if digest is None else digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk."""
    if os.name == "posix":  # Windows can't open a folder, and need not flush one
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
