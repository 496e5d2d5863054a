"""Sets attributes that name the index of a layer or the number of layers, where no configuration says what they are."""

from __future__ import annotations

import re

from torch import nn

from surgery.model_edits.edit_log import EditLog
from surgery.model_edits.model_differences import plain_attributes
from surgery.patterns.module_walk import base_modules
from surgery.patterns.wrappers import submodule

__all__ = ["renumber_layer", "set_layer_count"]

# Attributes that say a layer's position, in modules without a configuration.
_INDEX = re.compile(r"(layer|block|depth)_?(idx|index|id|number|num|i)|idx|index|layer_?i")
# Attributes of the module around a list of layers that say how many there are.
_COUNT = re.compile(r"(num|n|number_of)_?(hidden_|encoder_|decoder_)?(layers?|blocks?)|depth")


def renumber_layer(edits: EditLog, layer: nn.Module, index: int, position: int) -> None:
    """Set the attributes in a layer that name its index."""
    if position == index:
        return
    for _, module in base_modules(layer):
        for name, value in plain_attributes(module).items():
            if type(value) is int and value == index and _INDEX.fullmatch(name.lstrip("_")):
                edits.set_attribute(module, name, position)


def set_layer_count(edits: EditLog, path: str, before: int, after: int) -> None:
    """Set the attributes of the module around a list that say how many layers there are."""
    owner = submodule(edits.model, path.rpartition(".")[0])
    for name, value in plain_attributes(owner).items():
        if type(value) is int and value == before and _COUNT.fullmatch(name.lstrip("_")):
            edits.set_attribute(owner, name, after)
