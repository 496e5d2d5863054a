"""Checks names, dtypes and sizes of a session's inputs before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.errors import SurgeryError, near_misses
from surgery.onnx.runtime.dtypes import dtype_of, name_of

__all__ = ["Feeds", "Input"]


@dataclass(frozen=True)
class Input:
    """An input of the graph. In `shape`, a text or None is a free size."""

    name: str
    dtype: str
    shape: tuple[Any, ...]

    @staticmethod
    def of(node: Any) -> Input:
        return Input(node.name, name_of(node.type) or node.type, tuple(node.shape or ()))

    def array(self, value: Any) -> np.ndarray:
        """Returns a value as an array. Numbers and lists get the input's dtype if that does not change them."""
        dtype = dtype_of(self.dtype)
        if isinstance(value, (np.ndarray, np.generic)) or hasattr(value, "__array__"):
            return np.asarray(value)
        array = np.asarray(value)
        cast = array.astype(dtype) if array.dtype.kind in "biuf" else array
        compatible = array.dtype.kind == dtype.kind or dtype.kind in "fV" or not array.size
        return cast if compatible and (dtype.kind in "fV" or bool((cast == array).all())) else array


class Feeds:
    """The required and the optional inputs of a graph, without slots."""

    def __init__(self, required: Iterable[Input], optional: Iterable[Input] = ()):
        self.required = {item.name: item for item in required}
        self.optional = {item.name: item for item in optional}

    def check(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Returns the inputs as arrays. Raises `SurgeryError`, which lists all problems."""
        if not isinstance(inputs, Mapping):
            fix = f"{{{', '.join(map(repr, self.required))}: …}}"
            raise SurgeryError("inputs are given by name", why=f"inputs is {type(inputs).__name__}", fix=fix)
        wrong = list(self._names(inputs))
        arrays: dict[str, np.ndarray] = {}
        sizes: dict[str, tuple[int, str]] = {}
        for name, value in inputs.items():
            graph_input = self.required.get(name) or self.optional.get(name)
            if graph_input is not None:
                arrays[name] = graph_input.array(value)
                wrong += _misfit(graph_input, arrays[name], sizes)
        if wrong:
            raise SurgeryError("the inputs don't fit the file", why="; ".join(wrong[:6]), fix=f"it takes {self}")
        return arrays

    def _names(self, inputs: Mapping[str, Any]) -> Iterator[str]:
        for name in inputs:
            if name not in self.required and name not in self.optional:
                hint = near_misses(str(name), [*self.required, *self.optional])
                yield f"there is no input {name!r}" + (f": {hint}" if hint else "")
        if missing := [name for name in self.required if name not in inputs]:
            yield f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"

    def __str__(self) -> str:
        shown = [f"{item.name} {item.dtype}{_shape(item.shape)}" for item in self.required.values()]
        return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def _misfit(graph_input: Input, array: np.ndarray, sizes: dict[str, tuple[int, str]]) -> Iterator[str]:
    if array.dtype.name != graph_input.dtype:
        yield f"{graph_input.name} is {array.dtype.name}, and {graph_input.dtype} is wanted"
    if array.ndim != len(graph_input.shape):
        yield f"{graph_input.name} has the shape {array.shape}, and {_shape(graph_input.shape)} is wanted"
        return
    for size, expected in zip(array.shape, graph_input.shape, strict=True):
        if isinstance(expected, int) and expected != size:
            yield f"{graph_input.name} has the shape {array.shape}, and {_shape(graph_input.shape)} is wanted"
            return
        if isinstance(expected, str) and expected.isidentifier():  # an expression such as `a + 1` is not checked
            first, where = sizes.setdefault(expected, (size, graph_input.name))
            if first != size:
                yield f"{expected} is {first} in {where} and {size} in {graph_input.name}"


def _shape(shape: Sequence[Any]) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
