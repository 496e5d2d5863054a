"""Writes a checkpoint of transformers as a folder that mlx-lm opens."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from surgery.adapter_files.plain_json import read_json
from surgery.adapter_files.tensor_files import write_safetensors
from surgery.errors import SurgeryError
from surgery.progress import Progress
from surgery.storage.formats.file_tensor import FileTensor, LazyTensors
from surgery.storage.model_files.checkpoint import Checkpoint
from surgery.storage.model_files.mlx_config import MlxModel, check_mlx_config, config_for_mlx

__all__ = ["check_mlx", "write_mlx_folder"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHARD = 5 << 30  # bytes of a file at most, as mlx-lm writes them
_INDEX = "model.safetensors.index.json"


def check_mlx(config: Mapping[str, Any], dtype: torch.dtype | None = None) -> MlxModel:
    """Raises `SurgeryError` for a configuration whose model mlx-lm does not open. Needs no weights."""
    if dtype is not None and dtype not in FLOATS:
        why, fix = "mlx-lm computes in float32, float16 or bfloat16", "mlx_lm.convert -q quantises the folder"
        raise SurgeryError(f"no MLX folder is written in {dtype}", why=why, fix=fix)
    if config.get("quantization_config"):
        what, why = "quantised weights are not written into an MLX folder", "mlx-lm has its own"
        raise SurgeryError(what, why=why, fix='quantised="dequantise", then mlx_lm.convert -q')
    config_for_mlx(config)
    return check_mlx_config(config)


def write_mlx_folder(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None = None, progress: Progress = False
) -> Path:
    """Writes weights in shards, one tensor at a time, and the configuration with the fields that mlx-lm reads."""
    start = check_mlx(checkpoint.config, dtype).dropped_start
    config = config_for_mlx(checkpoint.config)
    tensors = {key.removeprefix(start): tensor for key, tensor in checkpoint.tensors.items()}
    if config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise SurgeryError(f"mlx-lm reads no weight of {tensor.dtype}", where=key)
        if dtype is not None and tensor.dtype != dtype:
            tensors[key] = tensor.convert(lambda value: value.to(dtype))
            config["dtype"] = str(dtype).removeprefix("torch.")
    folder.mkdir()
    shards = _shards(tensors)
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        with open(folder / name, "xb") as file:
            write_safetensors(file, LazyTensors(shard), {"format": "mlx"}, progress)
            file.flush()
            os.fsync(file.fileno())
    sizes = [torch.Size(tensor.shape).numel() for tensor in tensors.values()]
    total = sum(size * tensor.dtype.itemsize for size, tensor in zip(sizes, tensors.values(), strict=True))
    where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {
        "metadata": {"total_size": total, "total_parameters": sum(sizes)},
        "weight_map": dict(sorted(where.items())),
    }
    (folder / _INDEX).write_text(json.dumps(index, indent=4))
    (folder / "config.json").write_text(json.dumps(_plain(config, checkpoint), indent=4))
    for file in sorted(checkpoint.folder.iterdir()):
        if not file.name.endswith((".safetensors", _INDEX)) and file.name != "config.json" and file.is_file():
            shutil.copyfile(file, folder / file.name)
    return folder


def _plain(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields as the file of the checkpoint has them, and those that were added for mlx-lm, in order."""
    stored = read_json(checkpoint.folder / "config.json")
    added = {name: value for name, value in config.items() if name not in checkpoint.config or name in stored}
    added |= {name: config[name] for name in config if name not in stored and _is_json(config[name])}
    return dict(sorted((stored | added).items()))


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _shards(tensors: Mapping[str, FileTensor]) -> list[dict[str, FileTensor]]:
    shards: list[dict[str, FileTensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        nbytes = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        if size + nbytes > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += nbytes
    return shards
