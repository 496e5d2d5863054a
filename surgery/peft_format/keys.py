"""The keys of PEFT's files for a model, under every name they have been written by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from surgery.adapter_files.tensor_files import TensorFile
from surgery.patterns.module_walk import base_modules
from surgery.patterns.paths import pattern_value
from surgery.peft_format.key_history import Spelt, of_today

__all__ = ["keys_of", "moved"]


def keys_of(model: nn.Module, file: TensorFile, component: str | None = None) -> Spelt:
    """The keys of a file under today's names, at the paths of this model."""
    modules = dict(base_modules(model))

    def fits(key: str, path: str) -> bool:
        weight, shape = getattr(modules[path], "weight", None), file.shapes[key]
        return weight is not None and bool(shape) and any(size in weight.shape for size in shape)

    return of_today(list(file.shapes), lambda: modules.keys() - {""}, component, fits)


def moved(config: Mapping[str, Any], spelt: Spelt) -> dict[str, Any]:
    """A configuration whose paths are those of the file, for a model that has these modules at others.

    The targets are left to the file's keys; patterns of ranks are asked under the file's paths.
    """
    if not spelt.moved or "target_modules" not in config:
        return dict(config)
    found = {**config, "target_modules": None}
    found |= dict.fromkeys(config.keys() & {"exclude_modules", "layers_to_transform", "layers_pattern"})
    for name in ("rank_pattern", "alpha_pattern"):
        given = config.get(name)
        if isinstance(given, dict) and given:
            values = {here: pattern_value(given, there, None) for there, here in spelt.moved.items()}
            found[name] = {re.escape(path): value for path, value in values.items() if value is not None} | given
    return found
