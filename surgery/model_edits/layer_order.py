"""Puts the layers of lists into another order: fewer, repeated, exchanged. As if the model had been built so."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from surgery.errors import SiteError
from surgery.model_edits.config_fields import fields_of
from surgery.model_edits.config_search import find_layer_config
from surgery.model_edits.edit_log import EditLog, config_pairs
from surgery.model_edits.layer_config import LayerConfig, NoLayerConfig
from surgery.model_edits.layer_numbers import renumber_layer, set_layer_count
from surgery.model_edits.layer_position import adapt_layer, adapt_outside
from surgery.model_edits.module_copy import is_config
from surgery.model_edits.plain_model import configured
from surgery.patterns.module_class import class_of
from surgery.patterns.module_walk import base_modules
from surgery.patterns.wrappers import submodule

__all__ = ["is_layer_list", "reorder_layers"]


def is_layer_list(module: nn.Module) -> bool:
    """Whether a module calls its children in a list: a ModuleList, a Sequential, or a subclass of these."""
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def reorder_layers(edits: EditLog, paths: Iterable[str], order: Sequence[int], *, share_weights: bool = False) -> None:
    """Give lists of layers a new content, and adapt the configuration and the layers' indices to it.

    Args:
        edits: the edits of the rule.
        paths: the paths of lists of one length, which change together.
        order: for each new layer, the index of the present layer. A layer that occurs again is copied.
        share_weights: whether copies have the weights of the original layer.
    """
    groups: dict[tuple[str | None, int], list[str]] = {}
    for path in dict.fromkeys(paths):
        count = len(submodule(edits.model, path)._modules)
        groups.setdefault((configured(edits.model, path), count), []).append(path)
    for (part, _), containers in groups.items():
        if part is None:
            for path in containers:
                _renumber(edits, path, order, share_weights)
        else:
            _reorder_configured(edits, part, containers, order, share_weights)


# Models with a configuration ------------------------------------------------------------------------------------


def _reorder_configured(
    edits: EditLog, part: str, containers: Sequence[str], order: Sequence[int], share_weights: bool
) -> None:
    """Put lists in a model with a configuration into the order, and change what depends on a layer's position."""
    module = submodule(edits.model, part)
    inner = [path.removeprefix(part).lstrip(".") for path in containers]
    found = find_layer_config(module, inner, order)
    if isinstance(found, NoLayerConfig):
        _check_final(found, part, containers, order)
        for path in containers:
            _check_alike(edits.model, path, found.why, order)
            _renumber(edits, path, order, share_weights)
        edits.unplain.append(found.why)
        return
    kind = f"{class_of(module).__name__} of {len(order)} layers"
    for path, below in zip(containers, inner, strict=True):
        old, new = (list(model.get_submodule(below).children()) for model in (found.before, found.after))
        copied = _put_layers(edits, path, order, share_weights)
        for position, (index, layer) in enumerate(zip(order, _layers(edits.model, path), strict=True)):
            where = ".".join(filter(None, (path, str(position))))
            adapt_layer(edits, layer, (old[index], new[position]), (index, position), where, kind, position in copied)
    adapt_outside(edits, module, found, inner, part, kind)
    pairs = dict(config_pairs(module.config, found.config))
    edits.set_configs(pairs | _config_copies(module, found, pairs), part)


def _check_final(found: NoLayerConfig, part: str, containers: Sequence[str], order: Sequence[int]) -> None:
    """Raise `SiteError` if the model would not work without a configuration of that many layers."""
    if not found.final:
        return
    lists = [".".join(filter(None, (part, path))) for path in found.lists]
    others = [path for path in lists if path not in containers]
    fix = f"name the layers of {', '.join(others)} in the same rule, too" if others else "keep other layers"
    raise SiteError(
        "the layers of this list can't change alone" if others else "the model can't have these layers",
        where=", ".join(containers),
        why=found.why,
        fix=fix,
    )


def _check_alike(model: nn.Module, path: str, why: str, order: Sequence[int]) -> None:
    """Raise `SiteError` if the layers of a ModuleList have other shapes, and no configuration says what fits."""
    container = submodule(model, path)
    if not isinstance(container, nn.ModuleList):
        return
    shapes = [[tuple(parameter.shape) for parameter in layer.parameters()] for layer in container]
    if any(shape != shapes[0] for shape in shapes):
        raise SiteError(
            "the layers can't be put into this order",
            where=path,
            why=f"they have different shapes, and {why}",
            fix="choose a list whose layers are alike",
        )


def _config_copies(module: nn.Module, found: LayerConfig, pairs: Mapping[int, Any]) -> dict[int, Any]:
    """Changed copies of configurations that parts of the model have for themselves, as T5's decoder does."""
    changed = dict[int, Any]()
    for path, part in base_modules(module):
        for name, own in list(vars(part).items()):
            if not is_config(own) or id(own) in pairs or id(own) in changed or _inside(path, found.lists):
                continue
            before, after = (vars(submodule(model, path)).get(name) for model in (found.before, found.after))
            if is_config(before) and is_config(after):
                new = copy.copy(own)
                for place, value in fields_of(after):
                    if place.path or vars(before).get(place.name) == value:
                        continue
                    vars(new)[place.name] = copy.copy(value)
                if vars(new) != vars(own):
                    changed[id(own)] = new
    return changed


def _inside(path: str, lists: Sequence[str]) -> bool:
    return any(path.startswith(f"{container}.") for container in lists)


# Every model ----------------------------------------------------------------------------------------------------


def _put_layers(edits: EditLog, path: str, order: Sequence[int], share_weights: bool) -> set[int]:
    """Give a list its layers in the new order; return the positions of copies."""
    container = submodule(edits.model, path)
    present = list(container._modules.items())
    children: dict[str, nn.Module | None] = {}
    used, copied = set[int](), set[int]()
    for position, index in enumerate(order):
        name, layer = present[index]
        if index in used and layer is not None:
            layer = edits.copy(layer, share_weights=share_weights)
            copied.add(position)
        used.add(index)
        children[_name(present, name, position, children)] = layer
    edits.set_children(container, children)
    names = [name for name, _ in present]
    edits.steps.append((path, class_of(container).__name__, _summary(names, order)))
    return copied


def _renumber(edits: EditLog, path: str, order: Sequence[int], share_weights: bool) -> None:
    """Give a list its layers, and set attributes that name the index of a layer or the number of layers."""
    count = len(submodule(edits.model, path)._modules)
    _put_layers(edits, path, order, share_weights)
    for position, (index, layer) in enumerate(zip(order, _layers(edits.model, path), strict=True)):
        if layer is not None:
            renumber_layer(edits, layer, index, position)
    if len(order) != count:
        set_layer_count(edits, path, count, len(order))


def _layers(model: nn.Module, path: str) -> list[Any]:
    return list(submodule(model, path)._modules.values())


def _name(present: list[tuple[str, Any]], name: str, position: int, taken: Mapping[str, Any]) -> str:
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
