"""Names of modules in checkpoints on the hub, which programs use, where transformers has others in memory."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

__all__ = ["CheckpointNames"]

_LAYER = re.compile(r".*layers\.\d+\.")


class CheckpointNames:
    """The names in the checkpoints of a model of transformers. Other models have the same names everywhere."""

    def __init__(self, model: nn.Module):
        self.renamings: list[Any] = []
        if hasattr(model, "config") and hasattr(type(model), "from_pretrained"):
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming

            mapping: Any = get_model_conversion_mapping(model) or []  # type: ignore[arg-type]
            self.renamings = [entry.reverse_transform() for entry in mapping if isinstance(entry, WeightRenaming)]

    def other_name(self, path: str) -> str | None:
        """The name inside of its layer that a module has in checkpoints; None if it is the same.

        What stands before the layer's number differs between releases, and programs know all of it.
        """
        hit, name = _LAYER.match(path), f"{path}.weight"
        if hit is None:
            return None
        for renaming in reversed(self.renamings):
            name, _ = renaming.rename_source_key(name)
        inner, other = path[hit.end() :], _LAYER.sub("", name).removesuffix(".weight")
        return None if other == inner else other
