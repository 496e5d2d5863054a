"""One call at other sizes of its free dimensions, to prove that they are free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from surgery.onnx.calls.example import ExampleCall, leaves_of

__all__ = ["other_sizes", "sized", "sizes_of", "summed"]

Free = Mapping[str, Mapping[int, str]]  # input of the graph → axis → name
_MORE = {"batch": 1, "past": 2, "decoder_sequence": 1}


def other_sizes(example: ExampleCall, inputs: Sequence[str], free: Free) -> list[list[tuple[str, ExampleCall]]]:
    """The call as it is, then at other sizes: larger ones; smaller, in case that the model has too few positions; and
    with every batch doubled, in case that it has to have so many images for so many texts.

    A cache is also tried with nothing in it, as a decoder begins.
    """
    names = [name for name, leaf in leaves_of(example.values) if isinstance(leaf, Tensor)]
    by_leaf = {leaf: free.get(name, {}) for leaf, name in zip(names, inputs, strict=True)}
    sizes = sizes_of(example, by_leaf)
    asked = [[sizes]]
    if sizes:
        more = {name: size + _MORE.get(name, 3) for name, size in sizes.items()}
        less = {name: size + 1 if name == "batch" else max(2, size // 2) for name, size in sizes.items()}
        twice = {name: 2 * size if name.split("_")[-1] == "batch" else size for name, size in sizes.items()}
        asked.append([summed(more, sizes), summed(less, sizes), *([twice] if twice != sizes else [])])
    if "past" in sizes:
        asked.append([summed({**sizes, "past": 0}, sizes)])
    return [[(_describe(sizes), sized(example, by_leaf, sizes)) for sizes in group] for group in asked]


def sizes_of(example: ExampleCall, free: Free) -> dict[str, int]:
    """The free dimensions by name, as they are in a call."""
    sizes: dict[str, int] = {}
    for name, leaf in leaves_of(example.values):
        if isinstance(leaf, Tensor):
            sizes.update({dim: leaf.shape[axis] for axis, dim in free.get(name, {}).items() if dim.isidentifier()})
    return sizes


def summed(new: dict[str, int], old: Mapping[str, int]) -> dict[str, int]:
    """A mask's length follows from those of the cache and the text."""
    for text in ("sequence", "decoder_sequence"):
        if {"total", "past", text} <= old.keys() and old["total"] == old["past"] + old[text]:
            new["total"] = new["past"] + new[text]
    return new


def sized(example: ExampleCall, free: Free, sizes: Mapping[str, int]) -> ExampleCall:
    def asked(name: str, tensor: Tensor) -> tuple[int, ...]:
        shape = list(tensor.shape)
        for axis, dim in free.get(name, {}).items():
            shape[axis] = _size(dim, sizes, shape[axis])
        return tuple(shape)

    return example.resized(asked)


def _size(dim: str, sizes: Mapping[str, int], own: int) -> int:
    """A name's size, or that of a sum of names."""
    if dim in sizes:
        return sizes[dim]
    terms = [term.strip() for term in dim.split("+")]
    if all(term in sizes or re.fullmatch(r"\d+", term) for term in terms):
        return sum(sizes[term] if term in sizes else int(term) for term in terms)
    return own


def _describe(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) or "as given"
