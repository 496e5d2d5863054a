"""The keys of PEFT's files, under every name they have been written by, and settings for files that have none."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from surgery.errors import SurgeryError
from surgery.files import TensorFile
from surgery.match import base_modules
from surgery.peft_spelling import of_today

__all__ = ["keys_of", "settings_of"]


def keys_of(model: nn.Module, file: TensorFile) -> dict[str, str]:
    """PEFT's key of today → the key in the file."""
    return of_today(list(file.shapes), lambda: {path for path, _ in base_modules(model)})


def settings_of(model: nn.Module, file: TensorFile, keys: dict[str, str]) -> dict[str, Any]:
    """A configuration for tensors without one (diffusers' LoRA files): the ranks are in the shapes."""
    ranks = {}
    for key in keys:
        hit = re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key)
        if hit:
            ranks[hit[1]] = file.shapes[keys[key]][0] if file.shapes[keys[key]] else 0
    if not ranks:
        raise SurgeryError("there is no adapter_config.json beside the tensors", why="and they are no LoRA's")
    alphas = [key for key in keys if key.endswith(".alpha")]
    if alphas:
        raise SurgeryError("the file has an alpha for each layer and no adapter_config.json", where=alphas[0])
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {re.escape(path): rank for path, rank in ranks.items() if rank != usual}
    targets = "|".join(map(re.escape, ranks))
    config: dict[str, Any] = {"peft_type": "LORA", "r": usual, "lora_alpha": usual, "target_modules": targets}
    return {**config, "rank_pattern": others, "alpha_pattern": dict(others)}
