"""How the keys of PEFT's files have been spelt over time. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from surgery.errors import SurgeryError

__all__ = ["PREFIX", "of_today"]

PREFIX = "base_model.model."
_SPELLINGS = (
    (re.compile(r"\.lora\.down\.weight$|_lora\.down\.weight$"), ".lora_A.weight"),
    (re.compile(r"\.lora\.up\.weight$|_lora\.up\.weight$"), ".lora_B.weight"),
    (re.compile(r"\.lora_A\.default\.weight$"), ".lora_A.weight"),
    (re.compile(r"\.lora_B\.default\.weight$"), ".lora_B.weight"),
)  # diffusers' layers of old, and its files that were written with an adapter's name
_BEFORE = ("", "unet.", "transformer.", "text_encoder.", "text_encoder_2.", "prior.")


def of_today(held: Sequence[str], known: Callable[[], Collection[str]]) -> dict[str, str]:
    """PEFT's key of today → the key in the file. `known` gives the paths of the model's modules, if they are needed."""
    if "prompt_embeddings" in held or any(key.startswith("base_model.") for key in held):
        return {key: key for key in held}
    paths = known()
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


def _known(key: str, paths: Collection[str]) -> bool:
    while key:
        key = key.rpartition(".")[0]
        if key in paths:
            return key != ""
    return False
