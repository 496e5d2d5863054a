"""Opens and writes the files of an adapter in a format."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from surgery.adapter_files.plain_json import read_json
from surgery.adapter_files.tensor_files import TensorFile, open_tensors, replace_files, write_safetensors
from surgery.errors import SurgeryError
from surgery.progress import Progress
from surgery.storage.formats.file_tensor import LazyTensors
from surgery.storage.formats.gguf_file import open_gguf, write_gguf
from surgery.storage.formats.onnx_adapter_file import open_onnx_adapter, write_onnx_adapter
from surgery.storage.formats.place import ENDINGS
from surgery.storage.formats.table import AdapterFormat
from surgery.storage.formats.writing import FileContents
from surgery.transaction.created_folder import created_folder

__all__ = ["open_file", "settings_beside", "write_files"]


def open_file(path: Path) -> TensorFile:
    """Opens a file of tensors by its container. Pickles are opened with `weights_only`."""
    openers = {".gguf": open_gguf, ".onnx_adapter": open_onnx_adapter}
    return openers.get(path.suffix, open_tensors)(path)


def settings_beside(path: Path, adapter_format: AdapterFormat) -> Any:
    """The settings file beside a tensor file; None if there is none."""
    if adapter_format.settings_file is None:
        return None
    settings = path.parent / adapter_format.settings_file
    return read_json(settings) if settings.is_file() else None


def write_files(place: Path, adapter_format: AdapterFormat, files: FileContents, progress: Progress = False) -> Path:
    """Writes an adapter into a folder, or as the file that `place` names. One rename commits the result."""
    as_file = place.suffix in ENDINGS and not place.is_dir()
    if as_file and ENDINGS[place.suffix] != adapter_format.container:
        ending = Path(adapter_format.files[0]).suffix
        raise SurgeryError(f"a file of the format {adapter_format.name!r} ends in {ending}", where=str(place))
    path = place if as_file else place / adapter_format.files[0]
    tensors = LazyTensors(files.tensors)
    if adapter_format.container == "gguf":
        _write_one(path, lambda temporary: write_gguf(temporary, tensors, files.header))
        return place
    if adapter_format.container == "onnx_adapter":
        _write_one(path, lambda temporary: write_onnx_adapter(temporary, tensors))
        return place
    header = {name: text if isinstance(text, str) else json.dumps(text) for name, text in files.header.items()}
    write = partial(write_safetensors, tensors=tensors, metadata=header, progress=progress)
    if files.settings is not None and adapter_format.settings_file is not None:
        text = json.dumps(files.settings, indent=2) + "\n"
        replace_files(path.parent, (path.name, write), (adapter_format.settings_file, text.encode()))
    else:
        _write_one(path, partial(_write_synced, write=write))
    return place


def _write_synced(temporary: Path, write: Callable[[BinaryIO], None]) -> None:
    with open(temporary, "xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _write_one(path: Path, write: Callable[[Path], None]) -> None:
    """Writes one file under another name, and renames it."""
    with created_folder(path.parent):
        temporary = path.parent / f".surgery-{os.urandom(6).hex()}-{path.name}"
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
