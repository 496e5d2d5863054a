"""The files of a base checkpoint: its shards, the place of each tensor, and reads of one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.adapter_files.plain_json import LARGE, read_json
from surgery.adapter_files.tensor_files import DTYPES, TensorFile, open_tensors
from surgery.adapter_files.tensor_headers import AGAIN, Header, read_header
from surgery.errors import SurgeryError, abbreviate

__all__ = ["INDEX", "CheckpointFiles", "Shard", "StoredTensor", "open_checkpoint"]

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_PIECE = 1 << 30  # the most bytes of one read


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `dtype`: None for a number that torch does not have. `start`: the first byte in the file."""

    shard: str
    key: str
    code: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass
class Shard:
    """A weight file. `head`: the bytes before the data of a safetensors file. `pickle`: the tensors of a .bin file."""

    path: Path
    tensors: dict[str, StoredTensor]
    head: bytes = b""
    metadata: Mapping[str, str] = field(default_factory=dict)
    pickle: TensorFile | None = None

    def read(self, key: str) -> Tensor:
        """Reads a tensor into memory of its own."""
        place = self.tensors[key]
        if self.pickle is not None:
            return self.pickle.read(key).detach().clone(memory_format=torch.contiguous_format)
        if place.dtype is None:
            why = f"torch has no dtype for {place.code}"
            raise SurgeryError(f"{key} can't be read", where=self.path.name, why=why)
        tensor = torch.empty(place.shape, dtype=place.dtype)
        if place.nbytes:
            target = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
            with open(self.path, "rb", buffering=0) as file:
                file.seek(place.start)
                at = 0
                while at < place.nbytes:
                    count = file.readinto(target[at : at + _PIECE])
                    if not count:
                        raise SurgeryError(f"{self.path.name} is damaged", where=key, why="it was cut off", fix=AGAIN)
                    at += count
        return tensor

    def mapped(self, key: str) -> Tensor | None:
        """Maps a tensor into memory without reading it. None if it does not lie as torch needs it."""
        place = self.tensors[key]
        if self.pickle is not None:
            return self.pickle.read(key).detach()
        if place.dtype is None or place.start % place.dtype.itemsize or not place.nbytes:
            return None
        data = torch.from_file(str(self.path), shared=False, size=place.start + place.nbytes, dtype=torch.uint8)
        return data[place.start :].view(place.dtype).view(place.shape)


@dataclass
class CheckpointFiles:
    """A base checkpoint. `index`: the name of its index file; None for a single file."""

    folder: Path
    shards: dict[str, Shard]
    index: str | None

    def __post_init__(self) -> None:
        self.tensors = {key: place for shard in self.shards.values() for key, place in shard.tensors.items()}
        self.shard_of = {key: name for name, shard in self.shards.items() for key in shard.tensors}

    @property
    def pickled(self) -> bool:
        return any(shard.pickle is not None for shard in self.shards.values())

    def read(self, key: str) -> Tensor:
        return self.shards[self.shard_of[key]].read(key)

    def identity(self) -> list[Any]:
        """Returns what tells this checkpoint from another one: names, sizes, times and headers of its files."""
        config = self.folder / "config.json"
        facts: list[Any] = [hashlib.sha256(config.read_bytes()).hexdigest()] if config.is_file() else []
        for name, shard in self.shards.items():
            status = shard.path.stat()
            facts.append([name, status.st_size, status.st_mtime_ns, hashlib.sha256(shard.head).hexdigest()])
        return facts


def open_checkpoint(folder: Path) -> CheckpointFiles:
    """Opens the weight files of a folder: safetensors with or without an index, or .bin files.

    Raises:
        SurgeryError: files are absent or damaged, or contradict the index.
    """
    for single, index in ((WHOLE, INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / single).is_file():
            return CheckpointFiles(folder, {single: _open_shard(folder / single)}, None)
        if (folder / index).is_file():
            return _open_indexed(folder, index)
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    why = f"it holds {abbreviate(names, 'files')}" if names else "it is empty or is not a folder"
    fix = f"name a folder with {WHOLE}, {INDEX}, {PICKLE} or {PICKLE_INDEX}"
    raise SurgeryError(f"{folder} has no weights", why=why, fix=fix)


def _open_indexed(folder: Path, index: str) -> CheckpointFiles:
    data = read_json(folder / index, LARGE)
    mapping = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()) or not mapping:
        raise SurgeryError(f"{index} is damaged", why="it has no weight_map of file names", fix=AGAIN)
    names = sorted(set(mapping.values()))
    if outside := [name for name in names if Path(name).name != name or "\\" in name]:
        raise SurgeryError(f"{index} names a file outside of its folder", why=outside[0][:200])
    if absent := [name for name in names if not (folder / name).is_file()]:
        why, fix = f"the index names {abbreviate(absent, 'files')}", "copy or download the absent files"
        raise SurgeryError(f"weights of {folder} are absent", why=why, fix=fix)
    shards = {name: _open_shard(folder / name) for name in names}
    wrong = [key for key, name in mapping.items() if key not in shards[name].tensors]
    if wrong:
        why = f"{mapping[wrong[0]]} does not contain it"
        raise SurgeryError(f"{index} is damaged", where=abbreviate(wrong, "tensors"), why=why, fix=AGAIN)
    seen = dict[str, str]()
    for name, shard in shards.items():
        if twice := next((key for key in shard.tensors if key in seen), None):
            why = f"it is in {seen[twice]} and in {name}"
            raise SurgeryError("a tensor is stored twice", where=twice, why=why, fix=AGAIN)
        seen.update((key, name) for key in shard.tensors)
    return CheckpointFiles(folder, shards, index)


def _open_shard(path: Path) -> Shard:
    if path.suffix != ".safetensors":
        return _open_pickled(path)
    header = read_header(path)
    with open(path, "rb") as file:
        head = file.read(header.start)
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in header.tensors.items():
        dtype = DTYPES.get(tensor.dtype)
        if dtype is not None and tensor.numbers * dtype.itemsize != tensor.nbytes:
            why = f"its {tensor.nbytes} bytes are not those of {tensor.dtype} numbers of shape {tensor.shape}"
            raise SurgeryError(f"{path.name} is damaged", where=key[:200], why=why, fix=AGAIN)
        places = (header.start + tensor.start, tensor.nbytes)
        tensors[key] = StoredTensor(path.name, key, tensor.dtype, dtype, tensor.shape, *places)
    _check_gapless(path, header)
    return Shard(path, tensors, head, header.metadata)


def _check_gapless(path: Path, header: Header) -> None:
    """The tensors of a safetensors file fill its data: without gaps, and each byte belongs to one tensor."""
    end = 0
    for tensor in sorted(header.tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != end:
            why = f"its header leaves a gap, or two tensors overlap, at byte {end} of the data"
            raise SurgeryError(f"{path.name} is damaged", why=why, fix=AGAIN)
        end = tensor.end
    if end != header.space:
        why = f"its tensors end at byte {end} of {header.space}"
        raise SurgeryError(f"{path.name} is damaged", why=why, fix=AGAIN)


def _open_pickled(path: Path) -> Shard:
    file, codes = open_tensors(path), {dtype: code for code, dtype in DTYPES.items()}
    tensors = {
        key: StoredTensor(path.name, key, codes[dtype], dtype, shape, 0, torch.Size(shape).numel() * dtype.itemsize)
        for (key, shape), dtype in zip(file.shapes.items(), file.dtypes.values(), strict=True)
    }
    return Shard(path, tensors, metadata={"format": "pt"}, pickle=file)
