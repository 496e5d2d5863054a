"""The keys of PEFT's files for a model, under every name that has been in use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from surgery.adapter_files.tensor_files import TensorFile
from surgery.patterns.paths import pattern_value
from surgery.peft_format.key_history import Spelt, current_keys

__all__ = ["keys_of", "at_model_paths"]


def keys_of(modules: Mapping[str, nn.Module], file: TensorFile, component: str | None = None) -> Spelt:
    """A file's keys under today's names, at the paths of these modules of a model."""

    def fits(key: str, path: str) -> bool:
        weight, shape = getattr(modules[path], "weight", None), file.shapes[key]
        return weight is not None and bool(shape) and any(size in weight.shape for size in shape)

    return current_keys(list(file.shapes), modules.keys, component, fits)


def at_model_paths(config: Mapping[str, Any], spelt: Spelt) -> dict[str, Any]:
    """A configuration with the model's paths instead of the file's.

    Targets are left to the file's keys; patterns of ranks are matched against the file's paths.
    """
    if not spelt.moved or "target_modules" not in config:
        return dict(config)
    result = {**config, "target_modules": None}
    result |= dict.fromkeys(config.keys() & {"exclude_modules", "layers_to_transform", "layers_pattern"})
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name)
        if isinstance(patterns, dict) and patterns:
            values = {here: pattern_value(patterns, there, None) for there, here in spelt.moved.items()}
            result[name] = {re.escape(path): value for path, value in values.items() if value is not None} | patterns
    return result
