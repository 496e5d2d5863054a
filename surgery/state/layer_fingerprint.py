"""The part of a base fingerprint about lists of layers: how many there are, and two numbers of each layer.

A model whose layers were dropped, repeated or exchanged has the names and the shapes of another model. These numbers
tell the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from surgery.patterns.module_walk import base_modules

__all__ = ["layer_differences", "layer_numbers"]

LISTS, LAYERS = 8, 512
Numbers = Callable[[Tensor, int], list[float]]


def layer_numbers(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], numbers: Numbers) -> dict[str, Any]:
    """Returns for each outer list of layers its length, and two numbers of a tensor of each layer.

    Args:
        model: the model.
        tensors: its tensors that can be compared, by name.
        numbers: returns so many numbers of a tensor.
    """
    lists = dict(_lists(model))
    first: dict[str, dict[int, tuple[str, Tensor]]] = {path: {} for path in lists}
    for name, tensor in tensors:
        for path, layers in lists.items():
            begin = f"{path}." if path else ""
            layer, _, inner = name.removeprefix(begin).partition(".")
            if name.startswith(begin) and inner and layer in layers:
                first[path].setdefault(layers[layer], (inner, tensor))
    return {
        path: {
            "count": len(lists[path]),
            "numbers": {str(index): [inner, *numbers(tensor, 2)] for index, (inner, tensor) in found.items()},
        }
        for path, found in first.items()
    }


def layer_differences(
    model: nn.Module, expected: Any, tensors: Callable[[list[str]], Mapping[str, list[float]]], near: Any
) -> tuple[list[str], list[str]]:
    """Returns which lists of layers have another length than in a fingerprint, and which have other layers.

    Args:
        model: the model.
        expected: `layer_numbers` of the base.
        tensors: returns two numbers of each tensor with these names, as far as they can be compared.
        near: whether two numbers agree.
    """
    lists, lengths, others = dict(_lists(model)), list[str](), list[str]()
    for path, stored in expected.items() if isinstance(expected, Mapping) else ():
        layers = lists.get(path)
        if layers is None or not isinstance(stored, Mapping):
            continue
        where, count = path or "the model", stored.get("count")
        if type(count) is int and count != len(layers):
            lengths.append(f"{where} has {len(layers)} layers here and had {count}")
            continue
        names = _names(path, list(layers), stored.get("numbers"))
        present = tensors(list(names))
        other = [
            layer
            for name, (layer, values) in names.items()
            if name in present and not all(map(near, values, present[name]))
        ]
        if other:
            others.append(f"other layers are at {', '.join(other[:3])}{', …' if len(other) > 3 else ''} of {where}")
    return lengths, others


def _names(path: str, layers: list[str], numbers: Any) -> dict[str, tuple[str, list[Any]]]:
    """The compared tensors of a list: full name → the layer and its numbers."""
    names: dict[str, tuple[str, list[Any]]] = {}
    for index, entry in numbers.items() if isinstance(numbers, Mapping) else ():
        if not (isinstance(index, str) and index.isdecimal() and int(index) < len(layers)):
            continue
        if isinstance(entry, list) and entry and isinstance(entry[0], str):
            layer = layers[int(index)]
            names[".".join(filter(None, (path, layer, entry[0])))] = layer, entry[1:]
    return names


def _lists(model: nn.Module) -> Iterator[tuple[str, dict[str, int]]]:
    """The outer lists of layers: path → the index of each layer by its name."""
    outer: list[str] = []
    for path, module in base_modules(model):
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(_is_below(path, above) for above in outer):
            continue
        outer.append(path)
        layers = [name for name, child in module._modules.items() if child is not None]
        if len(outer) <= LISTS and len(layers) <= LAYERS:
            yield path, {name: index for index, name in enumerate(layers)}


def _is_below(path: str, above: str) -> bool:
    return not above or path.startswith(f"{above}.")
