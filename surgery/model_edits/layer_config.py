"""Finds the fields of a configuration that describe a list of layers, by building models from changed copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery.model_edits.plain_model import build_plain, differences

__all__ = ["LayerConfig", "find_layer_config"]


@dataclass(frozen=True)
class LayerConfig:
    """A configuration that builds a list of layers in a new order, and the models of the old and of the new one.

    Attributes:
        config: the changed copy. It has the same sub-configurations at the same places.
        fields: the changed fields, for messages.
        before, after: the models of the two configurations, on the meta device.
    """

    config: Any
    fields: tuple[str, ...]
    before: nn.Module
    after: nn.Module


def find_layer_config(module: nn.Module, container: str, order: Sequence[int]) -> LayerConfig | str:
    """Find the configuration with which the class of a model builds a list of layers of another length or order.

    A candidate is a number that equals the present number of layers, alone or in a list (the depths of stages). It is
    right if the model that is built from it has that many layers in this list, and as many as before in all others.
    Lists of one value a layer are taken along in the new order.

    Args:
        module: the model or part that has the configuration.
        container: the path of the list of layers in it.
        order: for each new layer, the index of the old one.

    Returns:
        The configuration, or why there is none.
    """
    config: Any = module.config
    count = len(module.get_submodule(container)._modules)
    before = build_plain(module, config)
    if before is None or _length(before, container) != count:
        return f"{type(config).__name__} does not build this {type(module).__name__}"
    best: tuple[int, LayerConfig] | None = None
    for field in [None] if len(order) == count else _counts(config, count):
        for taken in (True, False):
            changed, names = copy.deepcopy(config), []
            if taken:
                names = _permute(changed, count, order)
            if field is not None:
                _write(changed, field, len(order))
                names = [_name(field), *names]
            if taken and not names and field is None:
                continue
            after = build_plain(module, changed)
            if after is None or not _same_lengths(before, after, container, len(order)):
                continue
            score = _mismatches(before, after, container, order)
            if best is None or score < best[0]:
                best = score, LayerConfig(changed, tuple(names), before, after)
        if best is not None and best[0] == 0:
            break
    if best is None:
        return f"no field of {type(config).__name__} says the number of layers in {container}"
    return best[1]


# A place in a configuration: the names of sub-configurations, the field, and the index in it if it is a list.
_Place = tuple[tuple[str, ...], str, int | None]


def _counts(config: Any, count: int) -> list[_Place]:
    """The places whose value is the number of layers; those with a usual name come first."""
    places: list[_Place] = []
    for path, part in _parts(config):
        for name, value in vars(part).items():
            if type(value) is int and value == count:
                places.append((path, name, None))
            elif isinstance(value, (list, tuple)):
                places += [(path, name, i) for i, item in enumerate(value) if type(item) is int and item == count]
    return sorted(places, key=lambda place: not any(word in place[1] for word in ("layer", "depth", "block")))


def _permute(config: Any, count: int, order: Sequence[int]) -> list[str]:
    """Put lists with one value a layer into the new order; return their names."""
    names = []
    for path, part in _parts(config):
        for name, value in vars(part).items():
            if isinstance(value, (list, tuple)) and len(value) == count and not name.startswith("_"):
                if (
                    name in ("architectures", "depths")
                    or all(item is value[0] for item in value)
                    and len(order) == count
                ):
                    continue
                vars(part)[name] = type(value)([value[index] for index in order])
                names.append(_name((path, name, None)))
    return names


def _parts(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A configuration and those inside it, with the names of the fields that lead there."""
    yield path, config
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _parts(value, (*path, name))


def _write(config: Any, place: _Place, value: int) -> None:
    path, name, index = place
    for part in path:
        config = getattr(config, part)
    if index is None:
        vars(config)[name] = value
    else:
        items = vars(config)[name]
        vars(config)[name] = type(items)([value if i == index else item for i, item in enumerate(items)])


def _name(place: _Place) -> str:
    path, name, index = place
    return ".".join((*path, name)) + ("" if index is None else f"[{index}]")


def _length(model: nn.Module, container: str) -> int:
    try:
        return len(model.get_submodule(container)._modules)
    except AttributeError:
        return -1


def _same_lengths(before: nn.Module, after: nn.Module, container: str, length: int) -> bool:
    """Whether only this list of layers has another length."""
    if _length(after, container) != length:
        return False
    lists = (path for path, module in before.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential)))
    others = (path for path in lists if path != container and not path.startswith(f"{container}."))
    return all(_length(before, path) == _length(after, path) for path in others)


def _mismatches(before: nn.Module, after: nn.Module, container: str, order: Sequence[int]) -> int:
    """How many layers of the new model have other classes, tensors or children than the layers that go there."""
    old, new = list(before.get_submodule(container).children()), list(after.get_submodule(container).children())
    pairs = [differences(old[index], layer) for index, layer in zip(order, new, strict=True)]
    return sum(any(found.kinds or found.tensors for found in pair) for pair in pairs)
