"""Files of tensors and of settings: written so that a crash leaves the old ones or the new ones, read without trust.

Nothing in a file is run and no name in it is used as a path. What a header promises is held against the file's size
before anything is allocated.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from surgery.adapter_files.plain_json import parse_json
from surgery.errors import SurgeryError

__all__ = ["TensorFile", "open_tensors", "replace_files", "write_safetensors"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
MOST_HEADER = 32 << 20


# Writing ------------------------------------------------------------------------------------------------------


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Tensors in the safetensors format, one after the other: no second copy of them all is held."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        if tensor.dtype not in names:
            fix = f"convert it to one of {', '.join(str(dtype).removeprefix('torch.') for dtype in names)}"
            raise SurgeryError(f"the tensor {key!r} can't be saved", why=f"safetensors has no {tensor.dtype}", fix=fix)
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        flat = tensor.detach().cpu().resolve_conj().contiguous().reshape(-1)
        if flat.numel():
            file.write(flat.view(torch.uint8).numpy().data)


Writer = Callable[[BinaryIO], None]


def replace_files(
    folder: Path, tensors: tuple[str, Writer], settings: tuple[str, bytes], gone: tuple[str, ...] = ()
) -> None:
    """Put a pair of files into a folder, whole: killed at any moment, it holds the old pair or the new one.

    Everything is first written under names that nobody reads. The rename of the tensors is the moment of truth: they
    carry the settings in their metadata. The settings' own file is away at that moment, so that no reader, whatever
    program it is, can take new tensors for old settings; ours look under `put_away`, too. `gone` are further files of
    the adapter that was here before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as mark:
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
                os.replace(old, folder / put_away(settings[0]))
                _sync(folder)
            for name in (tensors[0], settings[0]):
                os.replace(files.pop(name), folder / name)
                _sync(folder)
            for name in (put_away(settings[0]), *gone):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(folder / name)
            _sync(folder)
        finally:
            for left in files.values():
                with contextlib.suppress(OSError):
                    os.unlink(left)


def put_away(name: str) -> str:
    return f".surgery-previous-{name}"


def _bytes(content: bytes) -> Writer:
    def write(file: BinaryIO) -> None:
        file.write(content)

    return write


def _sync(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder can't be opened, nor needs to be
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[str]:
    """One writer at a time, and the leftovers of killed ones swept away; gives a mark for temporary names."""
    try:
        import fcntl
    except ImportError:
        yield os.urandom(6).hex()
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for left in folder.glob(".surgery-*"):
            if not left.name.startswith(put_away("")):
                with contextlib.suppress(OSError):
                    left.unlink()
        yield os.urandom(6).hex()
    finally:
        os.close(handle)


# Reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorFile:
    """Tensors by name: shapes and dtypes are known, each one's numbers are read when asked for.

    `sound`: whether a look at all numbers at once found none that is NaN or infinite; where not, each tensor may tell.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    metadata: Mapping[str, str]
    read: Callable[[str], Tensor]
    sound: Callable[[], bool] = lambda: False


def open_tensors(path: Path) -> TensorFile:
    """A file of tensors, `.safetensors` or PyTorch's own `.bin`. `SurgeryError` for one that is damaged."""
    try:
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
    except OSError as error:
        raise SurgeryError(f"{path.name} can't be read", why=str(error)) from None


def _open_safetensors(path: Path) -> TensorFile:
    from safetensors import SafetensorError, safe_open

    header, metadata, start = _header(path)
    try:
        if set(safe_open(str(path), "pt").keys()) != set(header):
            raise SafetensorError("its header is ambiguous")
    except (SafetensorError, OSError, ValueError) as error:
        raise SurgeryError(f"{path.name} is damaged", why=str(error)[:200]) from None
    shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
    dtypes = {key: DTYPES[entry["dtype"]] for key, entry in header.items()}
    data = _mapped(path)[start:]

    def read(key: str) -> Tensor:  # a view of the mapped file
        first, end = header[key]["data_offsets"]
        slice_of_data = data[first:end]
        aligned = (start + first) % dtypes[key].itemsize == 0
        return (slice_of_data if aligned else slice_of_data.clone()).view(dtypes[key]).view(shapes[key])

    return TensorFile(shapes, dtypes, metadata, cache(read), cache(partial(_sound, data, set(dtypes.values()))))


def _mapped(path: Path) -> Tensor:
    """The bytes of a file, read from it where they are looked at. What is written to them does not go into the file."""
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def _sound(data: Tensor, dtypes: set[torch.dtype]) -> bool:
    """Whether the bytes of tensors of one dtype are all finite numbers, looked at a piece at a time."""
    if len(dtypes) != 1:
        return False
    (dtype,) = dtypes
    if not dtype.is_floating_point or data.storage_offset() % dtype.itemsize or data.numel() % dtype.itemsize:
        return False
    return all(bool(piece.float().isfinite().all()) for piece in data.view(dtype).split(1 << 20))


def _header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """A safetensors header, held against the size of its file; and where the data begins."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER):
            raise SurgeryError(f"{path.name} is damaged", why=f"a header of {length} bytes in a file of {size}")
        header = parse_json(file.read(length), f"the header of {path.name}")
    space = size - 8 - length
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(header, dict) or not isinstance(metadata, dict):
        raise SurgeryError(f"{path.name} is damaged", why="its header is not a mapping of tensors")
    for key, entry in header.items():
        if not _fits(entry, space):
            raise SurgeryError(
                f"{path.name} is damaged", where=key[:200], why=f"{str(entry)[:200]} in {space} bytes of data"
            )
    return header, {str(key): value for key, value in metadata.items() if isinstance(value, str)}, 8 + length


def _fits(entry: Any, space: int) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or entry["dtype"] not in DTYPES:
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        return False
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)) or len(shape) > 16:
        return False
    start, end = offsets
    return start <= end <= space and math.prod(shape) * DTYPES[entry["dtype"]].itemsize == end - start


def _open_pickle(path: Path) -> TensorFile:
    """PyTorch's own format, of tensors alone: with `weights_only`, and only where nothing in it is compressed."""
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
            raise SurgeryError(f"{path.name} is damaged", why="it promises more than it holds")
        pickled = [entry.file_size for entry in entries if entry.filename.endswith("data.pkl")]
        if sum(pickled) > MOST_HEADER:
            raise SurgeryError(f"{path.name} is damaged", why=f"{sum(pickled)} bytes of names")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except SurgeryError:
        raise
    except Exception as error:  # pickle, zip and torch have errors of many kinds
        raise SurgeryError(
            f"{path.name} can't be read as tensors", why=f"{type(error).__name__}: {error}"[:300]
        ) from None
    if not isinstance(content, dict) or not all(isinstance(key, str) and _is_plain(content[key]) for key in content):
        raise SurgeryError(f"{path.name} holds more than tensors by name")
    return TensorFile(
        {key: tuple(tensor.shape) for key, tensor in content.items()},
        {key: tensor.dtype for key, tensor in content.items()},
        {},
        content.__getitem__,
    )


def _is_plain(value: Any) -> bool:
    return (
        type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided and value.dtype in DTYPES.values()
    )
