"""Reads PEFT's checkpoints with numpy alone: the configuration, and the tensors under current keys."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.adapter_files.plain_json import read_json
from surgery.errors import SurgeryError
from surgery.peft_format.key_history import PREFIX, current_keys

__all__ = ["Checkpoint", "read_checkpoint"]

CONFIG, TENSORS, OLD = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# Fields that do not change what a saved adapter computes, or whose effect the keys show.
_IGNORED_FIELDS = frozenset(
    "peft_type peft_version task_type inference_mode auto_mapping base_model_name_or_path revision megatron_core "
    "runtime_config loftq_config eva_config corda_config lora_ga_config qalora_group_size _library_name "
    "low_cpu_mem_usage target_modules exclude_modules layers_to_transform layers_pattern modules_to_save "
    "fan_in_fan_out velora_config trainable_token_indices".split()
)
_BITS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32}
_BITS |= {"I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}


@dataclass
class Checkpoint:
    """A checkpoint. `tensors`: by key, without PEFT's prefix; `config`: the file's configuration, unchanged."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]

    def unsupported_fields(self, *known: str) -> Iterator[SurgeryError]:
        """Yields an error for each field that has an effect and that the converter does not know."""
        for name in sorted(self.config):
            value = self.config[name]
            if name not in _IGNORED_FIELDS and name not in known and value not in (None, False, "", [], {}, "none", 0):
                what = f"PEFT's {name}={str(value)[:80]!r} can't be converted"
                yield SurgeryError(what, why="no slot has its effect", fix="load_adapter and export_adapter")

    def number(self, name: str, default: float) -> float:
        value = self.config.get(name, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise SurgeryError(f"PEFT's {name}={str(value)[:80]!r} is not a number above 0")
        return value

    def patterns(self, name: str) -> dict[str, Any]:
        """Returns a field that maps patterns of paths to numbers above 0."""
        patterns = self.config.get(name) or {}
        if not isinstance(patterns, dict):
            raise SurgeryError(f"PEFT's {name} is not a mapping")
        for key, value in patterns.items():
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise SurgeryError(f"PEFT's {name} has {str(value)[:80]!r} for {key!r}, which is not a number above 0")
            re.compile(key)
        return patterns

    def flag(self, name: str) -> bool:
        value = self.config.get(name) or False
        if type(value) is not bool:
            raise SurgeryError(f"PEFT's {name}={str(value)[:80]!r} is neither true nor false")
        return value


def read_checkpoint(folder: str | Path, sites: Collection[str]) -> Checkpoint:
    """Reads a checkpoint. `sites`: the paths of modules, from which keys of old PEFT versions are recognised."""
    folder = Path(folder)
    if not (folder / TENSORS).is_file():
        old = (folder / OLD).is_file()
        why = f"{OLD} is a pickle, which may run code" if old else None
        fix = "load it with torch and save it as safetensors" if old else "the folder that save_pretrained wrote"
        raise SurgeryError(f"there is no {TENSORS} in {folder}", why=why, fix=fix)
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise SurgeryError(f"{CONFIG} is not a PEFT configuration", why="it has no peft_type")
    arrays = _tensors(folder / TENSORS)
    file_keys = current_keys(list(arrays), lambda: sites).keys
    tensors: dict[str, np.ndarray] = {}
    for key, file_key in file_keys.items():
        short = _short(key)
        if short in tensors and not np.array_equal(tensors[short], arrays[file_key]):
            raise SurgeryError("two different tensors of the file have the same current key", where=short)
        tensors[short] = arrays[file_key]
    return Checkpoint(config, {key: tensor for key, tensor in tensors.items() if ".original_module." not in key})


def _short(key: str) -> str:
    """Removes PEFT's wrappers and the adapter's name from a key; older files and other programs write them."""
    key = key.removeprefix(PREFIX).removeprefix("base_model.")
    key = re.sub(r"\.modules_to_save(?:\.default)?\.", ".", key)
    return re.sub(r"\.(lora_[A-Za-z_]+|ia3_l)\.default(?=\.|$)", r".\1", key)


def _tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, deserialize

    try:
        records = deserialize(path.read_bytes())
    except (OSError, SafetensorError, ValueError) as error:
        raise SurgeryError(f"{path.name} can't be read, or is damaged", why=str(error)[:200]) from None
    return {key: _array(key, record) for key, record in records}


def _array(key: str, record: Any) -> np.ndarray:
    if record["dtype"] == "BF16":  # the upper half of a float32
        halves = np.frombuffer(record["data"], np.uint16).astype(np.uint32)
        return (halves << 16).view(np.float32).reshape(record["shape"])
    if record["dtype"] not in _BITS:
        raise SurgeryError("a tensor has a dtype that can't be converted", where=key, why=record["dtype"])
    return np.frombuffer(record["data"], _BITS[record["dtype"]]).reshape(record["shape"])
