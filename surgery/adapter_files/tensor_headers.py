"""Reads headers of safetensors files: names, dtypes and shapes, but no tensors. Works without torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from surgery.adapter_files.plain_json import parse_json
from surgery.errors import SurgeryError

__all__ = ["Header", "TensorHeader", "damaged_entry", "read_header"]

MOST = 100 << 20  # bytes, as in safetensors itself


class TensorHeader(NamedTuple):
    """What a header says of a tensor; `start` and `end` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


class Header(NamedTuple):
    """A header: tensors by name, the metadata that are texts, the start of the data, and the bytes of data."""

    tensors: dict[str, TensorHeader]
    metadata: dict[str, str]
    start: int
    space: int


def read_header(path: Path, most: int = MOST) -> Header:
    """Returns a file's header, which fits the file's size. Raises `SurgeryError` if it does not.

    `most`: the limit of its bytes.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, most):
                raise SurgeryError(f"{path.name} is damaged", why=f"a header of {length} bytes in a file of {size}")
            data = parse_json(file.read(length), f"the header of {path.name}")
    except OSError as error:
        raise SurgeryError(f"{path.name} can't be read", why=str(error)) from None
    space = size - 8 - length
    metadata = data.pop("__metadata__", {}) if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(metadata, dict):
        raise SurgeryError(f"{path.name} is damaged", why="its header is not a mapping of tensors")
    tensors: dict[str, TensorHeader] = {}
    for key, entry in data.items():
        tensor = _tensor(entry, space)
        if tensor is None:
            raise damaged_entry(path, key, entry, space)
        tensors[key] = tensor
    texts = {str(key): value for key, value in metadata.items() if isinstance(value, str)}
    return Header(tensors, texts, 8 + length, space)


def damaged_entry(path: Path, key: str, entry: Any, space: int) -> SurgeryError:
    return SurgeryError(f"{path.name} is damaged", where=key[:200], why=f"{str(entry)[:200]} in {space} bytes of data")


def _tensor(entry: Any, space: int) -> TensorHeader | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return None
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        return None
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)) or len(shape) > 16:
        return None
    start, end = offsets
    return TensorHeader(entry["dtype"], tuple(shape), start, end) if start <= end <= space else None
