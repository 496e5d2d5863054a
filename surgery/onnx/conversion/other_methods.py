"""IA³, prefixes, prompts and fully trained modules of PEFT's checkpoints as the tensors of slots."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.onnx.runtime.dtypes import widened

if TYPE_CHECKING:
    from surgery.onnx.conversion.conversion_state import Conversion

__all__ = ["ia3", "prefix", "prompt", "tokens", "trained"]


def ia3(conversion: Conversion) -> None:
    """One number a feature, of what comes out or, in feedforward modules, of what goes in."""
    conversion.problems += conversion.checkpoint.unsaid("feedforward_modules", "init_ia3_weights")
    for key in [key for key in conversion.left if key == "ia3_l" or key.endswith(".ia3_l")]:
        path, scale = key.removesuffix("ia3_l").removesuffix("."), widened(conversion.left.pop(key))
        with conversion.noting(path):
            rule = conversion.rule_of(path, "ia3")
            fed = _fed(conversion.checkpoint.config.get("feedforward_modules") or (), path)
            if fed != any(_fits(text, path) for text in _texts(rule.get("feedforward"))):
                there, here = ("what goes in", "what comes out")[:: 1 if fed else -1]
                raise SurgeryError(f"the checkpoint scales {there} here, and the slot {here}")
            conversion.add(path, "ia3", {"scale": scale.reshape(-1)})


def _fed(setting: Any, path: str) -> bool:
    """As PEFT asks: an expression for the whole path, or endings, with no dot before them."""
    return re.fullmatch(setting, path) is not None if isinstance(setting, str) else any(map(path.endswith, setting))


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [name for name in value or () if isinstance(name, str)]


def _fits(text: str, path: str) -> bool:
    """As a rule's targets are read: an ending at a dot, or after `re:` an expression for the whole path."""
    if text.startswith("re:"):
        return re.fullmatch(text.removeprefix("re:"), path) is not None
    return text != "" and (path == text or path.endswith(f".{text}"))


# Prefixes -----------------------------------------------------------------------------------------------------


def prefix(conversion: Conversion) -> None:
    """Keys and values of all layers stand in one matrix, a row a virtual token: (length, layers · 2 · heads · size).

    PEFT's prefix takes positions, and ours none. Where the file has a slot that shifts the embedding of positions, the
    text's are shifted as PEFT's; with rotary positions the prefix's keys are turned back by its length, by the angles
    that the manifest gives for the site under `turn`.
    """
    checkpoint = conversion.checkpoint
    ours = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
    conversion.problems += checkpoint.unsaid(*ours, "encoder_hidden_size", "prefix_projection", "init_weights")
    matrix = conversion.left.pop("prompt_embeddings", None)
    sites = [site for site, rule in conversion.manifest.groups if rule == "prefix"]
    with conversion.noting("prompt_embeddings"):
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
            with conversion.noting(path):
                _place_prefix(conversion, path, parts[:, 2 * i], parts[:, 2 * i + 1], bool(shifts))


def _place_prefix(conversion: Conversion, path: str, keys: np.ndarray, values: np.ndarray, shifted: bool) -> None:
    slots = conversion.slots(path, "prefix")
    if "gate" in slots:
        raise SurgeryError("the slot's prefix has a gate, and PEFT's none")
    tensors = {}
    for name, flat in (("key", keys), ("value", values)):
        slot = slots.get(name)
        heads, _, size = slot.shape if slot is not None and len(slot.shape) == 3 else (None, None, None)
        if not heads or not size or flat.shape[1] != heads * size:
            raise SurgeryError(f"the prefix's {name}s don't fit the slot", why=f"{flat.shape[1]} numbers a token")
        tensors[name] = flat.reshape(len(flat), heads, size).transpose(1, 0, 2)
    site = conversion.site_of(path, "prefix")
    if "turn" not in site and not shifted:
        why = "PEFT's prefix shifts the text's positions, and the file does not say what makes up for that"
        raise SurgeryError("PEFT's prefix can't be converted here", why=why, fix="load_adapter and export_adapter")
    if site.get("turn") is not None:
        tensors["key"] = _turned(tensors["key"], site["turn"])
    conversion.add(path, "prefix", tensors)


def _turned(key: np.ndarray, turn: Any) -> np.ndarray:
    """Keys (heads, length, size) turned back by their number of positions."""
    rotation = turn if isinstance(turn, Mapping) else {}
    angles, pairs = rotation.get("frequencies"), rotation.get("pairs")
    good = isinstance(angles, list) and all(type(angle) in (int, float) for angle in angles)
    if not good or pairs not in ("halves", "neighbours") or 2 * len(angles) > key.shape[-1]:  # type: ignore[arg-type]
        raise SurgeryError("the manifest's turn is not valid", why=f"{turn!r}"[:200])
    count, by = len(angles), np.array(angles, np.float64) * key.shape[1]  # type: ignore[arg-type]
    first = slice(0, count) if pairs == "halves" else slice(0, 2 * count, 2)
    second = slice(count, 2 * count) if pairs == "halves" else slice(1, 2 * count, 2)
    rotated = key.astype(np.float64)
    x, y = rotated[..., first].copy(), rotated[..., second].copy()
    rotated[..., first] = x * np.cos(by) + y * np.sin(by)
    rotated[..., second] = y * np.cos(by) - x * np.sin(by)
    return rotated


def prompt(conversion: Conversion) -> None:
    """Virtual tokens before a text, a row each; of an encoder-decoder PEFT keeps as many rows again, and uses none.

    Of p-tuning a checkpoint holds what the network made.
    """
    checkpoint = conversion.checkpoint
    matrix, length = conversion.left.pop("prompt_embeddings", None), checkpoint.config.get("num_virtual_tokens")
    sites = [site for site, rule in conversion.manifest.groups if rule == "prompt"]
    with conversion.noting("prompt_embeddings"):
        if matrix is None or not sites:
            raise SurgeryError(
                "the checkpoint has no prompt" if matrix is None else "the file has no slot for a prompt"
            )
        if len(sites) > 1 or matrix.ndim != 2 or type(length) is not int or not 0 < length <= len(matrix):
            why = f"it is {matrix.shape} for {length!r} virtual tokens, and the file has {len(sites)} places"
            raise SurgeryError("the prompt does not fit the file", why=why)
        rule = conversion.rule_of(sites[0], "prompt")
        if rule.get("after", 0) != 0:
            raise SurgeryError("PEFT's virtual tokens stand before the text's first, and the slot's behind it")
        if rule.get("whole", False) != (checkpoint.config.get("task_type") == "SEQ_CLS"):
            why = "its classifiers see the virtual tokens, and its other outputs do not: PromptRule's `whole`"
            raise SurgeryError("the slot's virtual tokens are not PEFT's", why=why)
        conversion.add(sites[0], "prompt", {"prompt": widened(matrix[:length])})


# Modules that are trained whole -------------------------------------------------------------------------------


def trained(conversion: Conversion) -> None:
    """What is left are parameters under their own names: of modules_to_save, or biases beside a LoRA."""
    for key in list(conversion.left):
        names = key.replace(".base_layer.", ".").split(".")
        for cut in range(len(names) - 1, -1, -1):  # an attention's slots are those of its inner map, too
            path, name = ".".join(names[:cut]), "_".join(names[cut:])
            if name in conversion.manifest_slots(path, "train"):
                with conversion.noting(path):
                    conversion.add(path, "train", {name: conversion.left.pop(key)})
                break
        else:
            if names[-1] == "num_batches_tracked":  # of a BatchNorm: only training reads it
                del conversion.left[key]


def tokens(conversion: Conversion) -> None:
    """trainable_token_indices: the rows of some tokens, in the order in which the configuration lists them."""
    end = ".token_adapter.trainable_tokens_delta"
    indices: Any = conversion.checkpoint.config.get("trainable_token_indices") or {}
    keys = {key.removesuffix(end): key for key in conversion.left if key.endswith(end)}
    sites = [site for site, rule in conversion.manifest.groups if rule == "tokens"]
    if keys and set(sites) - set(keys):
        why = "whether they hold the same weight, whose rows PEFT changes for all of them, can't be told"
        fix = "load_adapter and export_adapter"
        what = "the file has slots for tokens of further modules"
        conversion.problems.append(SurgeryError(what, where=", ".join(sites), why=why, fix=fix))
    for path, key in keys.items():
        with conversion.noting(path):
            ids = (
                indices
                if isinstance(indices, list)
                else next(ids for name, ids in indices.items() if _fits(name, path))
            )
            index, rows = np.array(ids, np.int64), conversion.left.pop(key)
            if len(set(ids)) != len(ids) or index.ndim != 1 or len(rows) != len(index) or (index < 0).any():
                raise SurgeryError("the tokens' rows don't fit their numbers", why=f"{rows.shape}, for {len(ids)}")
            conversion.add(path, "tokens", {"rows": widened(rows), "index": index})
