"""Reads and writes files of tensors and settings. A crash leaves either the old files or the new ones.

Reading trusts nothing: no code in a file runs, no name in a file is used as a path, and the sizes in a header are
compared with the file's size before memory is allocated.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from surgery.adapter_files.tensor_headers import AGAIN, Header, damaged_entry, read_header
from surgery.errors import SurgeryError
from surgery.progress import Progress, each_step
from surgery.transaction.created_folder import created_folder

__all__ = ["TensorFile", "open_tensors", "replace_files", "write_safetensors"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
MOST_HEADER = 32 << 20


# Writing ------------------------------------------------------------------------------------------------------


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], progress: Progress = False
) -> None:
    """Writes tensors in the safetensors format, one at a time, so no second copy of all is in memory."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        if tensor.dtype not in names:
            fix = f"convert it to one of {', '.join(str(dtype).removeprefix('torch.') for dtype in names)}"
            raise SurgeryError(f"the tensor {key!r} can't be saved", why=f"safetensors has no {tensor.dtype}", fix=fix)
        if tensor.is_meta:
            why, fix = "it is on the meta device", "give the model memory and load the adapter's values first"
            raise SurgeryError(f"the tensor {key!r} has no values yet", why=why, fix=fix)
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    with each_step(tensors.values(), progress, "write") as counted_tensors:
        for tensor in counted_tensors:
            flat = tensor.detach().cpu().resolve_conj().contiguous().reshape(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)


Writer = Callable[[BinaryIO], None]


def replace_files(
    folder: Path, tensors: tuple[str, Writer], settings: tuple[str, bytes], obsolete: tuple[str, ...] = ()
) -> None:
    """Replaces a pair of files. A process that is killed at any moment leaves the old pair or the new one.

    Both files are first written under temporary names. One atomic rename of the tensors, whose metadata contains the
    settings, commits the save. Before it, the old settings file is renamed to `previous_name`, so that no program reads
    new tensors with old settings; our reader also looks there. `obsolete`: further files of the previous adapter.
    """
    with created_folder(folder), _locked(folder) as mark:
        files: dict[str, Path] = {}
        try:
            for name, write in (tensors, (settings[0], _bytes(settings[1]))):
                files[name] = folder / f".surgery-{mark}-{name}"
                with open(files[name], "xb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
            old = folder / settings[0]
            if old.exists():
                os.replace(old, folder / previous_name(settings[0]))
                _sync(folder)
            for name in (tensors[0], settings[0]):
                os.replace(files.pop(name), folder / name)
                _sync(folder)
            for name in (previous_name(settings[0]), *obsolete):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(folder / name)
            _sync(folder)
        finally:
            for temporary in files.values():
                with contextlib.suppress(OSError):
                    os.unlink(temporary)


def previous_name(name: str) -> str:
    return f".surgery-previous-{name}"


def _bytes(content: bytes) -> Writer:
    def write(file: BinaryIO) -> None:
        file.write(content)

    return write


def _sync(folder: Path) -> None:
    if os.name == "posix":  # Windows can't open a folder, and need not flush one
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[str]:
    """Locks the folder and deletes temporary files of killed writers. Yields a random part of temporary names."""
    try:
        import fcntl
    except ImportError:
        yield os.urandom(6).hex()
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for leftover in folder.glob(".surgery-*"):
            if not leftover.name.startswith(previous_name("")):
                with contextlib.suppress(OSError):
                    leftover.unlink()
        yield os.urandom(6).hex()
    finally:
        os.close(handle)


# Reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorFile:
    """Tensors by name, with their shapes and dtypes. `read` reads one tensor's numbers.

    `sound`: checks all numbers at once, and returns True if all are finite; False means that each must be checked.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    metadata: Mapping[str, str]
    read: Callable[[str], Tensor]
    sound: Callable[[], bool] = lambda: False


def open_tensors(path: Path) -> TensorFile:
    """Opens a `.safetensors` file or PyTorch's `.bin`. Raises `SurgeryError` if it is damaged."""
    try:
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
    except OSError as error:
        raise SurgeryError(f"{path.name} can't be read", why=str(error)) from None


def _open_safetensors(path: Path) -> TensorFile:
    from safetensors import SafetensorError, safe_open

    header = _header(path)
    try:
        if set(safe_open(str(path), "pt").keys()) != set(header.tensors):
            raise SafetensorError("its header is ambiguous")
    except (SafetensorError, OSError, ValueError) as error:
        raise SurgeryError(f"{path.name} is damaged", why=str(error)[:200], fix=AGAIN) from None
    shapes = {key: tensor.shape for key, tensor in header.tensors.items()}
    dtypes = {key: DTYPES[tensor.dtype] for key, tensor in header.tensors.items()}
    data = _map_bytes(path)[header.start :]

    def read(key: str) -> Tensor:  # a view of the mapped file
        first, end = header.tensors[key].start, header.tensors[key].end
        slice_of_data = data[first:end]
        aligned = (header.start + first) % dtypes[key].itemsize == 0
        return (slice_of_data if aligned else slice_of_data.clone()).view(dtypes[key]).view(shapes[key])

    return TensorFile(
        shapes, dtypes, header.metadata, cache(read), cache(partial(_all_finite, data, set(dtypes.values())))
    )


def _map_bytes(path: Path) -> Tensor:
    """Maps a file's bytes into memory. Writes to the result do not change the file."""
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def _all_finite(data: Tensor, dtypes: set[torch.dtype]) -> bool:
    """Whether all numbers are finite, checked in pieces. False if the tensors have several dtypes."""
    if len(dtypes) != 1:
        return False
    (dtype,) = dtypes
    if not dtype.is_floating_point or data.storage_offset() % dtype.itemsize or data.numel() % dtype.itemsize:
        return False
    return all(bool(piece.float().isfinite().all()) for piece in data.view(dtype).split(1 << 20))


def _header(path: Path) -> Header:
    """Returns a header that fits the file's size, and whose tensors torch can hold."""
    header = read_header(path, MOST_HEADER)
    for key, tensor in header.tensors.items():
        if tensor.dtype not in DTYPES or tensor.numbers * DTYPES[tensor.dtype].itemsize != tensor.nbytes:
            raise damaged_entry(path, key, tensor, header.space)
    return header


def _open_pickle(path: Path) -> TensorFile:
    """Opens PyTorch's format with `weights_only`. Refuses compressed content, which may expand to any size."""
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if not zipped:
        raise SurgeryError(
            f"{path.name} is damaged, or was written by a PyTorch before 1.6",
            fix="load it with torch and save it as safetensors",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise SurgeryError(f"{path.name} is damaged", why="its sizes exceed the file's size", fix=AGAIN)
        pickled = [entry.file_size for entry in entries if entry.filename.endswith("data.pkl")]
        if sum(pickled) > MOST_HEADER:
            raise SurgeryError(f"{path.name} is damaged", why=f"{sum(pickled)} bytes of names", fix=AGAIN)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except SurgeryError:
        raise
    except Exception as error:  # pickle, zip and torch raise errors of many classes
        raise SurgeryError(
            f"{path.name} can't be read as tensors", why=f"{type(error).__name__}: {error}"[:300], fix=AGAIN
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and _is_dense_tensor(content[key]) for key in content
    ):
        fix = "save a dict of tensors by name: torch.save(state_dict, file)"
        raise SurgeryError(f"{path.name} contains other things than tensors by name", fix=fix)
    return TensorFile(
        {key: tuple(tensor.shape) for key, tensor in content.items()},
        {key: tensor.dtype for key, tensor in content.items()},
        {},
        content.__getitem__,
    )


def _is_dense_tensor(value: Any) -> bool:
    return (
        type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided and value.dtype in DTYPES.values()
    )
