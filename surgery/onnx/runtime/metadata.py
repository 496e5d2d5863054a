"""Reads the metadata of an ONNX file, without its weights and without the onnx package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from surgery.errors import SurgeryError

__all__ = ["metadata_of"]

# An ONNX file is one protobuf message: a sequence of fields. Each field begins with its number, its kind and, for
# large values such as the graph, its length. Thus the reader can skip all fields but two.
_GRAPH, _METADATA = 7, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MOST = 256 << 20  # bytes of one text


def metadata_of(path: Path) -> dict[str, str]:
    """Returns a file's metadata, text by name. Raises `SurgeryError` if it is not an ONNX file."""
    metadata: dict[str, str] = {}
    graph = False
    try:
        with open(path, "rb") as file:
            for number, start, length in _fields(file, os.fstat(file.fileno()).st_size):
                graph |= number == _GRAPH
                if number == _METADATA:
                    key, value = _pair(file, start, length)
                    metadata[key] = value
                file.seek(start + length)
    except (ValueError, UnicodeDecodeError) as error:
        raise SurgeryError(f"{path.name} is not an ONNX file, or is damaged", why=str(error)[:200]) from None
    except OSError as error:
        raise SurgeryError(f"{path.name} can't be read", why=str(error)) from None
    if not graph:
        raise SurgeryError(f"{path.name} is not an ONNX file", why="it holds no graph")
    return metadata


def _pair(file: BinaryIO, start: int, length: int) -> tuple[str, str]:
    if length > _MOST:
        raise ValueError(f"{length} bytes of metadata")
    texts = {1: "", 2: ""}
    for number, value_start, size in _fields(file, start + length):
        texts[number] = file.read(size).decode("utf-8")
        file.seek(value_start + size)
    return texts[1], texts[2]


def _fields(file: BinaryIO, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields number, start and length of each field. The caller moves the file to the field's end before the next."""
    while file.tell() < end:
        key = _varint(file)
        number, kind = key >> 3, key & 7
        if kind == _BYTES:
            length = _varint(file)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        elif kind == _VARINT:
            _varint(file)
            length = 0
        else:
            raise ValueError(f"a field of kind {kind}")
        start = file.tell()
        if number < 1 or start + length > end:
            raise ValueError(f"a field of {length} bytes, {end - start} before the end")
        yield number, start, length


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("it ends within a number")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a number of more than ten bytes")
