"""Reads and writes adapters in onnxruntime's adapter format. A write is atomic, and a read trusts nothing.

The format has tensors by name and two numbers of 31 bits. We use the first as an identifier of the base and its slots,
and the second as a checksum. They reveal an adapter of another model, a damaged file and missing tensors.
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
    with atomic_write(path) as temporary:
        adapter_format.export_adapter(str(temporary))  # type: ignore[arg-type]  # it accepts only texts
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
    return {name: array_of_value(value) for name, value in read_values(path, manifest).items()}


def read_values(path: str | Path, manifest: Manifest) -> dict[str, Any]:
    """As `read_adapter`, but returns OrtValues, which share and keep alive the memory that onnxruntime filled."""
    from onnxruntime import AdapterFormat

    path = Path(path)
    problems: list[SurgeryError] = []
    try:
        with open(path, "rb"):
            pass
        content = AdapterFormat.read_adapter(str(path))  # type: ignore[arg-type]
        values = content.get_parameters()
        tensors = {name: _array(name, value) for name, value in values.items()}
        version, stored_checksum = content.get_model_version(), content.get_adapter_version()
    except OSError as error:
        raise listed(f"{path.name} can't be read", [SurgeryError(str(error))]) from None
    except SurgeryError as error:
        raise listed(f"{path.name} can't be used", [error]) from None
    except Exception as error:  # onnxruntime has no error class for this
        why, fix = "onnxruntime finds no adapter in it", "export_adapter and convert_peft write them"
        problem = SurgeryError("it is not an adapter file, or it is damaged", why=why, fix=fix)
        raise listed(f"{path.name} can't be used", [problem]) from error
    if stored_checksum != checksum(tensors):
        fix = "write it again with export_adapter, convert_peft or write_adapter; other programs write no checksum"
        problems.append(SurgeryError("it is damaged", why="its checksum does not match its tensors", fix=fix))
    elif version != model_version(manifest):
        fix = "make it for this file: export_adapter or convert_peft"
        problems.append(SurgeryError("it was made for another base, or for a file with other slots", fix=fix))
    if problems := problems + manifest.check(
        tensors, finite=not problems
    ):  # a correct checksum shows that they were checked before
        raise listed(f"{path.name} can't be used", problems)
    for value in values.values():
        value.surgery_content = content  # type: ignore[attr-defined]
    return values


def _array(name: str, value: Any) -> np.ndarray:
    """Returns an OrtValue's numbers, without a copy except for bfloat16."""
    kind = value.data_type()
    if name_of(kind) is None:  # reading texts would make onnxruntime follow addresses that are in the file
        raise SurgeryError(
            "it is not an adapter file, or it is damaged", where=name[:200], why=f"a {kind} is not a tensor of numbers"
        )
    return array_of_value(value) if kind == NAMES["bfloat16"] else value.numpy()


def model_version(manifest: Manifest) -> int:
    """Returns a number of the base and its slots: files that accept the same adapters have the same number."""
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
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path. After the block, the file written there atomically replaces the file at `path`."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=".surgery-", dir=path.parent))
    except OSError as error:
        raise SurgeryError(f"{path.name} can't be written", why=str(error)) from None
    try:
        temporary = folder / path.name
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # Windows can't open a folder, and need not flush one
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except OSError as error:
        raise SurgeryError(f"{path.name} can't be written", why=str(error)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
