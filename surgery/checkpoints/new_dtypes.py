"""The dtypes of a checkpoint that is written in another dtype, and its configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from surgery.checkpoints.base_skeleton import Skeleton
from surgery.checkpoints.checkpoint_files import CheckpointFiles

__all__ = ["config_with_dtype", "new_dtypes"]

_KEYS = ("dtype", "torch_dtype")


def new_dtypes(
    files: CheckpointFiles, skeleton: Skeleton, added: Mapping[str, str], dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The dtype of each tensor that gets another one, by its name in the files.

    Modules that transformers keeps in float32 stay so.
    """
    if dtype is None:
        return {}
    plan = getattr(skeleton.model, "_get_dtype_plan", lambda _: {})(dtype)
    patterns = [(re.compile(pattern.replace("*", ".*")), kept) for pattern, kept in plan.items()]
    memory = {disk: group.memory[0] for group in skeleton.names.groups for disk in group.disk}
    tensors = files.tensors
    dtypes: dict[str, torch.dtype] = {}
    for disk in (*tensors, *added):
        old = tensors[added.get(disk, disk)].dtype
        if old is None or not old.is_floating_point or old.itemsize == 1:
            continue
        new = next((kept for pattern, kept in patterns if pattern.search(memory.get(disk, disk))), dtype)
        if new != old:
            dtypes[disk] = new
    return dtypes


def config_with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The contents of `config.json` with another dtype, in its parts as well."""
    name = str(dtype).removeprefix("torch.")
    parts = {
        key: config_with_dtype(part, dtype) if isinstance(part, dict) and any(k in part for k in _KEYS) else part
        for key, part in config.items()
    }
    present = [key for key in _KEYS if key in config] or ["dtype"]
    return {**parts, **dict.fromkeys(present, name)}
