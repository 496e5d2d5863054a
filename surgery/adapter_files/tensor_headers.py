"""Reads headers of safetensors files: names, dtypes and shapes, but no tensors. Works without torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from surgery.adapter_files.plain_json import parse_json
from surgery.errors import SurgeryError

__all__ = ["Header", "TensorHeader", "damaged_entry", "read_header"]

AGAIN = "copy or download the file again, or save it again"
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
                why = f"it states a header of {length} bytes in a file of {size}"
                raise SurgeryError(f"{path.name} is damaged", why=why, fix=AGAIN)
            text = file.read(length)
            try:
                data = parse_json(text, f"the header of {path.name}")
            except SurgeryError as error:
                error.fix = error.fix or AGAIN
                raise
    except OSError as error:
        raise SurgeryError(f"{path.name} can't be read", why=str(error)) from None
    space = size - 8 - length
    metadata = data.pop("__metadata__", None) or {} if isinstance(data, dict) else None  # MLX writes null
    if not isinstance(data, dict) or not isinstance(metadata, dict):
        raise SurgeryError(f"{path.name} is damaged", why="its header is not a mapping of tensors", fix=AGAIN)
    tensors: dict[str, TensorHeader] = {}
    for key, entry in data.items():
        tensor = _tensor(entry, space)
        if tensor is None:
            raise damaged_entry(path, key, entry, space)
        tensors[key] = tensor
    texts = {str(key): value for key, value in metadata.items() if isinstance(value, str)}
    return Header(tensors, texts, 8 + length, space)


def damaged_entry(path: Path, key: str, entry: Any, space: int) -> SurgeryError:
    """The error for a tensor whose entry in the header does not fit the file's bytes of data, `space`."""
    return SurgeryError(f"{path.name} is damaged", where=key[:200], why=_describe(entry, space), fix=AGAIN)


def _describe(entry: Any, space: int) -> str:
    if isinstance(entry, dict):
        offsets = entry.get("data_offsets")
        entry = TensorHeader(str(entry.get("dtype")), entry.get("shape"), *offsets) if _is_span(offsets) else None  # type: ignore[arg-type]
    if not isinstance(entry, TensorHeader):
        return "its header does not give this tensor a dtype, a shape, and a first and a last byte"
    if entry.end > space:
        return f"this tensor ends at byte {entry.end} of the data, and the file has {space}: it was cut off"
    shape = str(entry.shape)[:100]
    return f"this tensor has {entry.nbytes} bytes, which are not those of {entry.dtype[:20]} numbers of shape {shape}"


def _is_span(offsets: Any) -> bool:
    return isinstance(offsets, list) and len(offsets) == 2 and all(type(at) is int and 0 <= at for at in offsets)


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
