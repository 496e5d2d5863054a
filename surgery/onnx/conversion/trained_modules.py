"""Converts parameters that PEFT trains whole, beside any method: modules_to_save, biases, token embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.onnx.conversion.target_names import matches_target
from surgery.onnx.runtime.dtypes import widened

if TYPE_CHECKING:
    from surgery.onnx.conversion.conversion_state import Conversion

__all__ = ["convert_token_rows", "convert_trained_parameters"]


def convert_trained_parameters(conversion: Conversion) -> None:
    """Converts the remaining tensors, which have their parameters' names: of modules_to_save, or biases."""
    for key in list(conversion.remaining_tensors):
        names = key.replace(".base_layer.", ".").split(".")
        for cut in range(len(names) - 1, -1, -1):  # the slots of an attention include those of its output map
            path, name = ".".join(names[:cut]), "_".join(names[cut:])
            if name in conversion.manifest_slots(path, "train"):
                with conversion.collecting_errors(path):
                    conversion.add(path, "train", {name: conversion.remaining_tensors.pop(key)})
                break
        else:
            if names[-1] == "num_batches_tracked":  # a BatchNorm reads it only in training
                del conversion.remaining_tensors[key]


def convert_token_rows(conversion: Conversion) -> None:
    """Converts trainable_token_indices: an embedding's rows, in the configuration's order of the tokens."""
    suffix = ".token_adapter.trainable_tokens_delta"
    indices: Any = conversion.checkpoint.config.get("trainable_token_indices") or {}
    keys = {key.removesuffix(suffix): key for key in conversion.remaining_tensors if key.endswith(suffix)}
    sites = [site for site, rule in conversion.manifest.groups if rule == "tokens"]
    if keys and set(sites) - set(keys):
        why = "PEFT changes the rows for all modules that share the weight, and the file does not tell whether these do"
        fix = "load_adapter and export_adapter"
        what = "the file has slots for tokens of further modules"
        conversion.problems.append(SurgeryError(what, where=", ".join(sites), why=why, fix=fix))
    for path, key in keys.items():
        with conversion.collecting_errors(path):
            ids = (
                indices
                if isinstance(indices, list)
                else next(ids for name, ids in indices.items() if matches_target(name, path))
            )
            index, rows = np.array(ids, np.int64), conversion.remaining_tensors.pop(key)
            if len(set(ids)) != len(ids) or index.ndim != 1 or len(rows) != len(index) or (index < 0).any():
                raise SurgeryError("the tokens' rows don't fit their numbers", why=f"{rows.shape}, for {len(ids)}")
            conversion.add(path, "tokens", {"rows": widened(rows), "index": index})
