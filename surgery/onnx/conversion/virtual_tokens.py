"""Converts PEFT's prefixes, prompts and p-tuning: trained virtual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.onnx.conversion.converters import converter
from surgery.onnx.runtime.dtypes import widened

if TYPE_CHECKING:
    from surgery.onnx.conversion.conversion_state import Conversion

__all__ = ["convert_prefix", "convert_prompt"]


@converter("PREFIX_TUNING")
def convert_prefix(conversion: Conversion) -> None:
    """Converts the matrix of all layers' keys and values: (length, layers · 2 · heads · size).

    PEFT's prefix shifts the text's positions, and the file's prefix does not. A slot for the position embedding gets
    the shift. With rotary positions the keys are rotated back by the length, with the angles in the manifest (`turn`).
    """
    checkpoint = conversion.checkpoint
    fields = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
    conversion.problems += checkpoint.unsupported_fields(
        *fields, "encoder_hidden_size", "prefix_projection", "init_weights"
    )
    matrix = conversion.remaining_tensors.pop("prompt_embeddings", None)
    sites = [site for site, rule in conversion.manifest.groups if rule == "prefix"]
    with conversion.collecting_errors("prompt_embeddings"):
        if matrix is None or not sites:
            raise SurgeryError(
                "the checkpoint has no prefix" if matrix is None else "the file has no slots for a prefix"
            )
        if checkpoint.config.get("num_transformer_submodules") not in (None, 1):
            raise SurgeryError("PEFT's num_transformer_submodules is not 1", why="it is an encoder-decoder's prefix")
        layers = checkpoint.config.get("num_layers", len(sites))
        if layers != len(sites) or matrix.ndim != 2 or matrix.shape[1] % (2 * len(sites)):
            why = f"it is {matrix.shape} for {layers} layers, and the file has {len(sites)} sites"
            raise SurgeryError("the prefix does not fit the file", why=why)
        shifts = [site for site, rule in conversion.manifest.groups if rule == "shift"]
        for path in shifts:
            conversion.add(path, "shift", {"by": np.array([len(matrix)])})
        parts = widened(matrix).reshape(len(matrix), 2 * len(sites), -1)
        for i, path in enumerate(sites):
            with conversion.collecting_errors(path):
                _fill_prefix(conversion, path, parts[:, 2 * i], parts[:, 2 * i + 1], bool(shifts))


def _fill_prefix(conversion: Conversion, path: str, keys: np.ndarray, values: np.ndarray, shifted: bool) -> None:
    """Fills one site's prefix. `shifted`: a slot of the file shifts the position embedding."""
    slots = conversion.slots(path, "prefix")
    if "gate" in slots:
        raise SurgeryError("the slot's prefix has a gate, and PEFT's prefix does not")
    tensors = {}
    for name, flat in (("key", keys), ("value", values)):
        slot = slots.get(name)
        heads, _, size = slot.shape if slot is not None and len(slot.shape) == 3 else (None, None, None)
        if not heads or not size or flat.shape[1] != heads * size:
            raise SurgeryError(f"the prefix's {name}s don't fit the slot", why=f"{flat.shape[1]} numbers a token")
        tensors[name] = flat.reshape(len(flat), heads, size).transpose(1, 0, 2)
    site = conversion.site_of(path, "prefix")
    if "turn" not in site and not shifted:
        why = "PEFT's prefix shifts the text's positions, and the file has no shift or rotation that does the same"
        raise SurgeryError(
            "PEFT's prefix can't be converted for this file", why=why, fix="load_adapter and export_adapter"
        )
    if site.get("turn") is not None:
        tensors["key"] = _rotate_back(tensors["key"], site["turn"])
    conversion.add(path, "prefix", tensors)


def _rotate_back(key: np.ndarray, turn: Any) -> np.ndarray:
    """Rotates keys (heads, length, size) back by `length` positions."""
    rotation = turn if isinstance(turn, Mapping) else {}
    angles, pairs = rotation.get("frequencies"), rotation.get("pairs")
    valid = isinstance(angles, list) and all(type(angle) in (int, float) for angle in angles)
    if not valid or pairs not in ("halves", "neighbours") or 2 * len(angles) > key.shape[-1]:  # type: ignore[arg-type]
        raise SurgeryError("the manifest's turn is not valid", why=f"{turn!r}"[:200])
    count, by = len(angles), np.array(angles, np.float64) * key.shape[1]  # type: ignore[arg-type]
    first = slice(0, count) if pairs == "halves" else slice(0, 2 * count, 2)
    second = slice(count, 2 * count) if pairs == "halves" else slice(1, 2 * count, 2)
    rotated = key.astype(np.float64)
    x, y = rotated[..., first].copy(), rotated[..., second].copy()
    rotated[..., first] = x * np.cos(by) + y * np.sin(by)
    rotated[..., second] = y * np.cos(by) - x * np.sin(by)
    return rotated


@converter("PROMPT_TUNING", "P_TUNING")
def convert_prompt(conversion: Conversion) -> None:
    """Converts the virtual tokens before a text, one row each. Of p-tuning, a checkpoint has the network's output.

    For an encoder-decoder PEFT saves twice as many rows and uses the first half.
    """
    checkpoint = conversion.checkpoint
    matrix, length = (
        conversion.remaining_tensors.pop("prompt_embeddings", None),
        checkpoint.config.get("num_virtual_tokens"),
    )
    sites = [site for site, rule in conversion.manifest.groups if rule == "prompt"]
    with conversion.collecting_errors("prompt_embeddings"):
        if matrix is None or not sites:
            raise SurgeryError(
                "the checkpoint has no prompt" if matrix is None else "the file has no slot for a prompt"
            )
        if len(sites) > 1 or matrix.ndim != 2 or type(length) is not int or not 0 < length <= len(matrix):
            why = f"it is {matrix.shape} for {length!r} virtual tokens, and the file has {len(sites)} places"
            raise SurgeryError("the prompt does not fit the file", why=why)
        rule = conversion.rule_of(sites[0], "prompt")
        if rule.get("after", 0) != 0:
            raise SurgeryError("PEFT's virtual tokens precede the text, and the slot's follow the text's first token")
        if rule.get("whole", False) != (checkpoint.config.get("task_type") == "SEQ_CLS"):
            why = "its classifiers see the virtual tokens, and its other outputs do not: PromptRule's `whole`"
            raise SurgeryError("the slot's virtual tokens are not PEFT's", why=why)
        conversion.add(sites[0], "prompt", {"prompt": widened(matrix[:length])})
