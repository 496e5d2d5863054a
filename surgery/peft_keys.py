"""The keys of PEFT's files, under every name they have been written by, and settings for files that have none."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from surgery.errors import SurgeryError
from surgery.files import TensorFile
from surgery.match import base_modules

__all__ = ["keys_of", "settings_of"]

PREFIX = "base_model.model."
_SPELLINGS = (
    (re.compile(r"\.lora\.down\.weight$|_lora\.down\.weight$"), ".lora_A.weight"),
    (re.compile(r"\.lora\.up\.weight$|_lora\.up\.weight$"), ".lora_B.weight"),
    (re.compile(r"\.lora_A\.default\.weight$"), ".lora_A.weight"),
    (re.compile(r"\.lora_B\.default\.weight$"), ".lora_B.weight"),
)  # diffusers' layers of old, and its files that were written with an adapter's name
_BEFORE = ("", "unet.", "transformer.", "text_encoder.", "text_encoder_2.", "prior.")


def keys_of(model: nn.Module, file: TensorFile) -> dict[str, str]:
    """PEFT's key of today → the key in the file."""
    held = [key for key in file.shapes]
    if "prompt_embeddings" in held or any(key.startswith("base_model.") for key in held):
        return {key: key for key in held}
    paths = {path for path, _ in base_modules(model)}
    before = max(_BEFORE, key=lambda text: sum(_known(_spelt(key, text), paths) for key in held))
    found: dict[str, str] = {}
    for key in held:
        found.setdefault(PREFIX + _spelt(key, before), key)
    if len(found) != len(held):
        raise SurgeryError("two tensors of the file have the same name here")
    return found


def _spelt(key: str, before: str) -> str:
    key = re.sub(r"(^|\.)processor\.", r"\1", key.removeprefix(before))
    for pattern, suffix in _SPELLINGS:
        key = pattern.sub(suffix, key)
    return re.sub(r"(^|\.)to_out\.lora_", r"\1to_out.0.lora_", key)


def _known(key: str, paths: set[str]) -> bool:
    while key:
        key = key.rpartition(".")[0]
        if key in paths:
            return key != ""
    return False


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
