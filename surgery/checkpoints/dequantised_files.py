"""A checkpoint of packed weights as one of plain weights: each tensor is dequantised when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoints.base_skeleton import read_config
from surgery.checkpoints.checkpoint_files import CheckpointFiles, Shard, StoredTensor
from surgery.errors import MergeError, SurgeryError
from surgery.packed.scaled_codes import mxfp4_numbers, scaled_codes

__all__ = ["METHODS", "DequantisedShard", "dequantised_files", "plain_config", "plain_dtypes", "quantisation_of"]

METHODS = ("mxfp4", "fp8")
_CODES = ("F8_E4M3", "F8_E5M2", "I8", "U8")


@dataclass
class DequantisedShard(Shard):
    """A weight file with plain tensors in the place of codes. They are in float32, as sums are computed.

    `packed`: for each of these tensors, the names of its codes and scales, which may lie in another file.
    """

    files: CheckpointFiles | None = None
    packed: dict[str, tuple[str, str]] = field(default_factory=dict)
    block: tuple[int, int] | None = None

    def read(self, key: str) -> Tensor:
        if key not in self.packed:
            return super().read(key)
        assert self.files is not None
        codes, scales = (self.files.read(name) for name in self.packed[key])
        return mxfp4_numbers(codes, scales) if codes.dim() == 4 else scaled_codes(codes, scales, self.block)

    def mapped(self, key: str) -> Tensor | None:
        return None if key in self.packed else super().mapped(key)


def quantisation_of(folder: Path) -> dict[str, Any]:
    """The settings of quantisation in `config.json`, of the model or a part of it; empty if it is not quantised."""
    config = read_config(folder)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    settings = next((part["quantization_config"] for part in parts if part.get("quantization_config")), {})
    return settings if isinstance(settings, dict) else {"quant_method": settings}


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of `config.json` without the settings of quantisation."""
    plain = {name: plain_config(part) if isinstance(part, dict) else part for name, part in config.items()}
    return {name: part for name, part in plain.items() if name != "quantization_config"}


def dequantised_files(files: CheckpointFiles) -> CheckpointFiles:
    """Returns the files of a quantised checkpoint with the names, sizes and numbers of the plain model's weights.

    Raises:
        MergeError: the layout is not known, or scales are absent.
    """
    settings = quantisation_of(files.folder)
    method = str(settings.get("quant_method", "unknown"))
    if method not in METHODS or files.pickled:
        raise MergeError(
            "the base can't be dequantised in its files",
            where=str(files.folder),
            why=f"its weights are packed by {method[:100]}" + (", in .bin files" if files.pickled else ""),
            fix='load the model, and merge_to(model, folder, quantised="dequantise")',
        )
    block = settings.get("weight_block_size")
    size = (int(block[0]), int(block[1])) if isinstance(block, (list, tuple)) and len(block) == 2 else None
    shards: dict[str, Shard] = {}
    dropped = _of_the_layout(files)
    for name, shard in files.shards.items():
        tensors, packed = dict[str, StoredTensor](), dict[str, tuple[str, str]]()
        for key, place in shard.tensors.items():
            names = _plain_and_scales(key, place, files)
            if names is None:
                if key not in dropped:
                    tensors[key] = place
                continue
            plain, scales = names
            packed[plain] = key, scales
            shape = _shape(place)
            nbytes = 4 * torch.Size(shape).numel()
            tensors[plain] = StoredTensor(name, plain, "F32", torch.float32, shape, place.start, nbytes)
        whole = DequantisedShard(shard.path, tensors, shard.head, shard.metadata, None, files, packed, size)
        shards[name] = whole if packed or len(tensors) < len(shard.tensors) else shard
    return CheckpointFiles(files.folder, shards, files.index)


def plain_dtypes(
    files: CheckpointFiles, dtypes: Mapping[str, torch.dtype], dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The dtype of each tensor that is written in another one than it is read in, or that is dequantised.

    `dtypes`: those of the first kind. `dtype`: that of dequantised tensors; None: the one that `config.json` names.
    """
    config = read_config(files.folder)
    named = [part.get("dtype", part.get("torch_dtype")) for part in (config, config.get("text_config") or {})]
    own = dtype or next((getattr(torch, name, None) for name in named if isinstance(name, str)), None)
    packed = [key for shard in files.shards.values() if isinstance(shard, DequantisedShard) for key in shard.packed]
    return {**dict.fromkeys(packed, own if isinstance(own, torch.dtype) else torch.bfloat16), **dtypes}


def _plain_and_scales(key: str, place: StoredTensor, files: CheckpointFiles) -> tuple[str, str] | None:
    """The name of the plain tensor of these codes, and that of their scales; None for other tensors."""
    if key.endswith("_blocks") and place.code == "U8" and len(place.shape) == 4:
        plain = key.removesuffix("_blocks")
        return plain, _scales(plain, (f"{plain}_scales",), files)
    if place.code in _CODES and len(place.shape) in (2, 3) and not key.endswith(("_scales", "_scale_inv", "_scale")):
        names = [f"{key}_scale_inv", f"{key.removesuffix('.weight')}.scale"]
        ordinary = place.code in ("I8", "U8") and not any(name in files.tensors for name in names)
        return None if ordinary else (key, _scales(key, names, files))
    return None


def _scales(plain: str, names: Any, files: CheckpointFiles) -> str:
    found = next((name for name in names if name in files.tensors), None)
    if found is None:
        why = f"there is no {' and no '.join(names)}"
        raise SurgeryError("the scales of a quantised weight are absent", where=plain, why=why)
    return found


def _of_the_layout(files: CheckpointFiles) -> set[str]:
    """The names of scales and of other tensors that a plain model does not have."""
    scales = {names[1] for key, place in files.tensors.items() if (names := _plain_and_scales(key, place, files))}
    return scales | {key for key in files.tensors if key.endswith("activation_scale")}


def _shape(place: StoredTensor) -> tuple[int, ...]:
    """The sizes of the plain tensor."""
    if len(place.shape) == 4:
        experts, out, blocks, half = place.shape
        return experts, blocks * half * 2, out
    pairs = place.code in ("I8", "U8")
    return (*place.shape[:-1], place.shape[-1] * (2 if pairs else 1))
