"""Resizes a call's free dimensions, to test that they are free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from surgery.onnx.calls.example import ExampleCall, leaves_of

__all__ = ["other_sizes", "resize", "sizes_of", "with_total"]

Free = Mapping[str, Mapping[int, str]]  # input of the graph → axis → name
_MORE = {"batch": 1, "past": 2, "decoder_sequence": 1}


def other_sizes(example: ExampleCall, inputs: Sequence[str], free: Free) -> list[list[tuple[str, ExampleCall]]]:
    """Returns groups of alternatives: the call itself; the call at other sizes; and with an empty cache, if it has one.

    Other sizes are larger; or smaller, if the model has too few positions; or all batches doubled, if the model needs a
    fixed number of images for each text. The first alternative that the model accepts is used.
    """
    names = [name for name, leaf in leaves_of(example.values) if isinstance(leaf, Tensor)]
    by_leaf = {leaf: free.get(name, {}) for leaf, name in zip(names, inputs, strict=True)}
    sizes = sizes_of(example, by_leaf)
    groups = [[sizes]]
    if sizes:
        more = {name: size + _MORE.get(name, 3) for name, size in sizes.items()}
        less = {name: size + 1 if name == "batch" else max(2, size // 2) for name, size in sizes.items()}
        twice = {name: 2 * size if name.split("_")[-1] == "batch" else size for name, size in sizes.items()}
        groups.append([with_total(more, sizes), with_total(less, sizes), *([twice] if twice != sizes else [])])
    if "past" in sizes:
        groups.append([with_total({**sizes, "past": 0}, sizes)])
    return [[(_describe(sizes), resize(example, by_leaf, sizes)) for sizes in group] for group in groups]


def sizes_of(example: ExampleCall, free: Free) -> dict[str, int]:
    """Returns a call's sizes by the names of its free dimensions."""
    sizes: dict[str, int] = {}
    for name, leaf in leaves_of(example.values):
        if isinstance(leaf, Tensor):
            sizes.update({dim: leaf.shape[axis] for axis, dim in free.get(name, {}).items() if dim.isidentifier()})
    return sizes


def with_total(new: dict[str, int], old: Mapping[str, int]) -> dict[str, int]:
    """Sets a mask's length to that of cache and text together, if the old sizes have this relation."""
    for text in ("sequence", "decoder_sequence"):
        if {"total", "past", text} <= old.keys() and old["total"] == old["past"] + old[text]:
            new["total"] = new["past"] + new[text]
    return new


def resize(example: ExampleCall, free: Free, sizes: Mapping[str, int]) -> ExampleCall:
    """Returns the call with these sizes of its free dimensions."""

    def shape_of(name: str, tensor: Tensor) -> tuple[int, ...]:
        shape = list(tensor.shape)
        for axis, dim in free.get(name, {}).items():
            shape[axis] = _size(dim, sizes, shape[axis])
        return tuple(shape)

    return example.resized(shape_of)


def _size(dim: str, sizes: Mapping[str, int], current: int) -> int:
    """Returns the size of a dimension: of a name, or of a sum of names and numbers; else its current size."""
    if dim in sizes:
        return sizes[dim]
    terms = [term.strip() for term in dim.split("+")]
    if all(term in sizes or re.fullmatch(r"\d+", term) for term in terms):
        return sum(sizes[term] if term in sizes else int(term) for term in terms)
    return current


def _describe(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) or "as given"
