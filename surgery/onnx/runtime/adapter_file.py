"""Adapters in files of onnxruntime's adapter format: written whole or not at all, and read without trust.

The format holds tensors by name and two numbers of 31 bits. One says here which base and slots the tensors are for,
the other is a checksum of them all: so an adapter of another model, a damaged file and one that lacks a part are told.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.onnx.runtime.adapter_check import listed
from surgery.onnx.runtime.dtypes import NAMES, array_of_value, describe_dtype, name_of, value_of
from surgery.onnx.runtime.manifest import Manifest

__all__ = ["read_adapter", "write_adapter"]

_BITS = 0x7FFFFFFF


def write_adapter(path: str | Path, tensors: Mapping[str, np.ndarray], manifest: Manifest) -> Path:
    """Write an adapter's tensors as an `.onnx_adapter` file, which any program with onnxruntime can load.

    Args:
        path: the file; it is written under another name and then renamed.
        tensors: slot name → array.
        manifest: the exported file's manifest.

    Returns:
        The file's path.

    Raises:
        LoadError: lists why the tensors do not fit the file (`Manifest.check`); nothing is written.
    """
    from onnxruntime import AdapterFormat

    path = Path(path)
    if problems := manifest.check(tensors):
        raise listed(f"{path.name} can't be written", problems)
    adapter_format = AdapterFormat()
    adapter_format.set_model_version(model_version(manifest))
    adapter_format.set_adapter_version(checksum(tensors))
    adapter_format.set_parameters({name: value_of(tensor) for name, tensor in tensors.items()})
    with replaced(path) as place:
        adapter_format.export_adapter(str(place))  # type: ignore[arg-type]  # it takes no other path
    return path


def read_adapter(path: str | Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """Read the tensors of an `.onnx_adapter` file, checked against the slots.

    Args:
        path: the adapter's file.
        manifest: the exported file's manifest.

    Returns:
        Slot name → array.

    Raises:
        LoadError: lists what is wrong: another kind of file, a damaged file, another base or other slots, tensors that
            do not fit (`Manifest.check`).
    """
    return {name: array_of_value(value) for name, value in opened(path, manifest).items()}


def opened(path: str | Path, manifest: Manifest) -> dict[str, Any]:
    """As `read_adapter`, with OrtValues: they use, and keep alive, the memory that onnxruntime read the file into."""
    from onnxruntime import AdapterFormat

    path = Path(path)
    problems: list[SurgeryError] = []
    try:
        with open(path, "rb"):
            pass
        content = AdapterFormat.read_adapter(str(path))  # type: ignore[arg-type]
        values = content.get_parameters()
        tensors = {name: _array(name, value) for name, value in values.items()}
        about, sum_ = content.get_model_version(), content.get_adapter_version()
    except OSError as error:
        raise listed(f"{path.name} can't be read", [SurgeryError(str(error))]) from None
    except SurgeryError as error:
        raise listed(f"{path.name} can't be used", [error]) from None
    except Exception as error:  # onnxruntime has none of its own for this
        why, fix = "onnxruntime finds none in it", "export_adapter and convert_peft write them"
        problem = SurgeryError("it is not an adapter file, or it is damaged", why=why, fix=fix)
        raise listed(f"{path.name} can't be used", [problem]) from error
    if sum_ != checksum(tensors):
        fix = "write it again: export_adapter, convert_peft or write_adapter; other programs' have no checksum"
        problems.append(SurgeryError("it is damaged", why="its checksum is that of other tensors", fix=fix))
    elif about != model_version(manifest):
        fix = "make it for this file: export_adapter or convert_peft"
        problems.append(SurgeryError("it was made for another base, or for a file with other slots", fix=fix))
    if problems := problems + manifest.check(tensors, finite=not problems):  # as they were when they were written
        raise listed(f"{path.name} can't be used", problems)
    for value in values.values():
        value.surgery_held = content  # type: ignore[attr-defined]
    return values


def _array(name: str, value: Any) -> np.ndarray:
    """The numbers without a copy, except for bfloat16."""
    kind = value.data_type()
    if name_of(kind) is None:  # of texts, onnxruntime would follow what the file says are their addresses
        raise SurgeryError(
            "it is not an adapter file, or it is damaged", where=name[:200], why=f"a {kind} is not a tensor of numbers"
        )
    return array_of_value(value) if kind == NAMES["bfloat16"] else value.numpy()


def model_version(manifest: Manifest) -> int:
    """A number for a base and its slots: two files that accept the same adapters have the same number."""
    return int.from_bytes(manifest.digest[:4], "little") & _BITS


def checksum(tensors: Mapping[str, np.ndarray]) -> int:
    crc = 0
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        kind = describe_dtype(tensor.dtype)
        crc = zlib.crc32(f"{name}\0{kind}\0{tensor.shape}\0".encode(), crc)
        data: Any = tensor.reshape(-1).view(np.uint8) if kind == "bfloat16" else tensor
        crc = zlib.crc32(data, crc)
    return crc & _BITS


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A place to write to; what is there at the end of the block takes the file's place, all at once."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=".surgery-", dir=path.parent))
    except OSError as error:
        raise SurgeryError(f"{path.name} can't be written", why=str(error)) from None
    try:
        place = folder / path.name
        yield place
        with place.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(place, path)
        if os.name == "posix":  # elsewhere a folder can't be opened, nor needs to be
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except OSError as error:
        raise SurgeryError(f"{path.name} can't be written", why=str(error)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
