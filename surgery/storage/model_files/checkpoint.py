"""A checkpoint of transformers in a folder: its configuration, and tensors that are read one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.adapter_files.plain_json import LARGE, read_json
from surgery.adapter_files.tensor_files import open_tensors
from surgery.errors import SurgeryError
from surgery.storage.formats.file_tensor import FileTensor, tensor_of

__all__ = ["Checkpoint", "open_checkpoint_folder"]

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A folder, the configuration with all its fields, and the tensors by name."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, FileTensor]


def open_checkpoint_folder(folder: Path) -> Checkpoint:
    """Opens the safetensors files of a folder that `save_pretrained` wrote."""
    from transformers import AutoConfig

    index = folder / _INDEX
    names = set(read_json(index, LARGE)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    if absent := [name for name in sorted(names) if not (folder / name).is_file()]:
        why = f"{absent[0]} is not in it"
        raise SurgeryError("the folder is not a whole checkpoint of transformers", where=folder.name, why=why)
    tensors: dict[str, FileTensor] = {}
    for name in sorted(names):
        file = open_tensors(folder / name)
        tensors |= {key: tensor_of(file, key) for key in file.shapes}
    return Checkpoint(folder, AutoConfig.from_pretrained(folder).to_dict(), tensors)
