"""Puts the layers of a list into another order: fewer, repeated, exchanged. As if the model had been built so."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from surgery.errors import SiteError
from surgery.model_edits.edit_log import EditLog
from surgery.model_edits.layer_config import LayerConfig, find_layer_config
from surgery.model_edits.plain_model import Difference, configured, differences, plain_attributes
from surgery.patterns.module_class import class_of
from surgery.patterns.module_walk import base_modules
from surgery.patterns.wrappers import submodule

__all__ = ["is_layer_list", "reorder_layers"]

# Attributes that say a layer's position, in modules without a configuration.
_INDEX = re.compile(r"(layer|block|depth)_?(idx|index|id|number|num|i)|idx|index|layer_?i")
# Attributes of the module around a list of layers that say how many there are.
_COUNT = re.compile(r"(num|n|number_of)_?(hidden_|encoder_|decoder_)?(layers?|blocks?)|depth")


def is_layer_list(module: nn.Module) -> bool:
    """Whether a module calls its children in a list: a ModuleList, a Sequential, or a subclass of these."""
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def reorder_layers(edits: EditLog, path: str, order: Sequence[int], *, share_weights: bool = False) -> None:
    """Give a list of layers a new content, and adapt the configuration and the layers' indices to it.

    Args:
        edits: the edits of the rule.
        path: the path of the list.
        order: for each new layer, the index of the present layer. A layer that occurs again is copied.
        share_weights: whether copies have the weights of the original layer.
    """
    container = submodule(edits.model, path)
    present = list(container._modules.items())
    part = configured(edits.model, path)
    module = submodule(edits.model, part) if part is not None else None
    layer_config: LayerConfig | str = "the model does not have a configuration"
    if module is not None:
        inner = path.removeprefix(part or "").lstrip(".")
        layer_config = find_layer_config(module, inner, order)
    children: dict[str, nn.Module | None] = {}
    used: set[int] = set()
    for position, index in enumerate(order):
        name, layer = present[index]
        if index in used and layer is not None:
            layer = edits.copy(layer, share_weights=share_weights)
        used.add(index)
        children[_name(present, name, position, children)] = layer
    edits.set_children(container, children)
    names = [name for name, _ in present]
    edits.steps.append((path, class_of(container).__name__, _summary(names, order)))
    if module is None or isinstance(layer_config, str):
        _renumber(edits, path, names, order)
        if module is not None:
            edits.unplain.append(str(layer_config))
        return
    _adapt(edits, module, part or "", path.removeprefix(part or "").lstrip("."), layer_config, order)


def _name(present: list[tuple[str, Any]], name: str, position: int, taken: dict[str, Any]) -> str:
    """The key of a layer: its number, or its old name in a Sequential with names."""
    if all(key == str(index) for index, (key, _) in enumerate(present)):
        return str(position)
    again = 2
    unique = name
    while unique in taken:
        unique, again = f"{name}_{again}", again + 1
    return unique


def _summary(names: Sequence[str], order: Sequence[int]) -> str:
    dropped = [names[index] for index in range(len(names)) if index not in order]
    text = f"{len(names)} → {len(order)} layers"
    return f"{text}, without {', '.join(dropped)}" if dropped else text


# Models with a configuration ------------------------------------------------------------------------------------


def _adapt(
    edits: EditLog, module: nn.Module, part: str, container: str, layer_config: LayerConfig, order: Sequence[int]
) -> None:
    """Put the new configuration in place, and set what depends on the position of a layer."""
    before, after = layer_config.before, layer_config.after
    old, new = _children(before, container), _children(after, container)
    layers = _children(module, container)
    for position, index in enumerate(order):
        where = ".".join(filter(None, (part, container, str(position))))
        for difference in differences(old[index], new[position]):
            _check_tensors(difference, where, class_of(module).__name__, len(order))
            if difference.kinds:
                edits.unplain.append(
                    f"{where} is a {difference.kinds[0]}, and a {class_of(module).__name__} of {len(order)} layers "
                    f"has a {difference.kinds[1]} there"
                )
                continue
            _set_attributes(edits, layers[position], difference, where)
    for difference in differences(before, after, skipped=container):
        where = ".".join(filter(None, (part, difference.path)))
        _check_tensors(difference, where, class_of(module).__name__, len(order))
        _set_attributes(edits, module, difference, where, index=True)
    edits.set_config(module.config, _with_identity(layer_config.config, module.config))


def _with_identity(new: Any, old: Any) -> Any:
    """The new configuration with the private fields of the old one, such as its attention and its folder."""
    for name, value in vars(old).items():
        if name.startswith("_") and name in vars(new) and not hasattr(value, "to_dict"):
            vars(new)[name] = copy.copy(value)
    return new


def _children(module: nn.Module, container: str) -> list[nn.Module]:
    return [child for child in submodule(module, container)._modules.values() if child is not None]


def _check_tensors(difference: Difference, where: str, kind: str, count: int) -> None:
    if difference.tensors and not difference.kinds:
        place = ".".join(filter(None, (where, difference.path)))
        raise SiteError(
            "the layers can't be put into this order",
            where=place,
            why=f"a {kind} of {count} layers has other tensors there: {'; '.join(difference.tensors[:3])}",
            fix="leave the layers in place whose tensors depend on their position, such as the first",
        )


def _set_attributes(edits: EditLog, owner: nn.Module, difference: Difference, where: str, index: bool = False) -> None:
    """Set the attributes that differ between the two plain models, unless the model's own value is another one."""
    target = submodule(owner, difference.path)
    own = plain_attributes(target)
    for name, (was, becomes) in difference.attributes.items():
        if name not in own or own[name] != was:
            continue
        edits.set_attribute(target, name, copy.copy(becomes))
        if not index and not isinstance(becomes, int):
            place = ".".join(filter(None, (where, difference.path, name)))
            edits.warnings.append(
                f"{place} becomes {becomes!r} (before: {was!r}), as in a model built with these layers"
            )


# Models without a configuration ---------------------------------------------------------------------------------


def _renumber(edits: EditLog, path: str, names: Sequence[str], order: Sequence[int]) -> None:
    """Set attributes that name the index of a layer or the number of layers."""
    container = submodule(edits.model, path)
    for position, (index, layer) in enumerate(zip(order, list(container._modules.values()), strict=True)):
        if layer is None or position == index:
            continue
        for _, module in base_modules(layer):
            for name, value in plain_attributes(module).items():
                if type(value) is int and value == index and _INDEX.fullmatch(name.lstrip("_")):
                    edits.set_attribute(module, name, position)
    if len(order) == len(names):
        return
    owner = submodule(edits.model, path.rpartition(".")[0]) if path else container
    for name, value in plain_attributes(owner).items():
        if type(value) is int and value == len(names) and _COUNT.fullmatch(name.lstrip("_")):
            edits.set_attribute(owner, name, len(order))
