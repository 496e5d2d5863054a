"""What a session is fed: names, types and sizes are looked at before it runs, and told in words."""

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
    """An input of the graph; of its shape, a text or None is a size that may be any."""

    name: str
    dtype: str
    shape: tuple[Any, ...]

    @staticmethod
    def of(node: Any) -> Input:
        return Input(node.name, name_of(node.type) or node.type, tuple(node.shape or ()))

    def array(self, value: Any) -> np.ndarray:
        """A value as an array. Numbers and lists are taken as of the input's type where that changes none of them."""
        own = dtype_of(self.dtype)
        if isinstance(value, (np.ndarray, np.generic)) or hasattr(value, "__array__"):
            return np.asarray(value)
        array = np.asarray(value)
        cast = array.astype(own) if array.dtype.kind in "biuf" else array
        alike = array.dtype.kind == own.kind or own.kind in "fV" or not array.size
        return cast if alike and (own.kind in "fV" or bool((cast == array).all())) else array


class Feeds:
    """The inputs that a graph must be given, and those that it may be given."""

    def __init__(self, required: Iterable[Input], optional: Iterable[Input] = ()):
        self.required = {item.name: item for item in required}
        self.optional = {item.name: item for item in optional}

    def checked(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The inputs as arrays; `SurgeryError` that lists what onnxruntime would stumble over."""
        if not isinstance(inputs, Mapping):
            fix = f"{{{', '.join(map(repr, self.required))}: …}}"
            raise SurgeryError("inputs are given by name", why=f"this is {type(inputs).__name__}", fix=fix)
        wrong = list(self._names(inputs))
        arrays: dict[str, np.ndarray] = {}
        sizes: dict[str, tuple[int, str]] = {}
        for name, value in inputs.items():
            known = self.required.get(name) or self.optional.get(name)
            if known is not None:
                arrays[name] = known.array(value)
                wrong += _misfit(known, arrays[name], sizes)
        if wrong:
            raise SurgeryError("the inputs don't fit the file", why="; ".join(wrong[:6]), fix=f"it takes {self}")
        return arrays

    def _names(self, inputs: Mapping[str, Any]) -> Iterator[str]:
        for name in inputs:
            if name not in self.required and name not in self.optional:
                hint = near_misses(str(name), [*self.required, *self.optional])
                yield f"there is no input {name!r}" + (f": {hint}" if hint else "")
        if lacking := [name for name in self.required if name not in inputs]:
            yield f"{', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing"

    def __str__(self) -> str:
        shown = [f"{item.name} {item.dtype}{_shape(item.shape)}" for item in self.required.values()]
        return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def _misfit(known: Input, array: np.ndarray, sizes: dict[str, tuple[int, str]]) -> Iterator[str]:
    if array.dtype.name != known.dtype:
        yield f"{known.name} is {array.dtype.name}, and {known.dtype} is wanted"
    if array.ndim != len(known.shape):
        yield f"{known.name} has the shape {array.shape}, and {_shape(known.shape)} is wanted"
        return
    for size, own in zip(array.shape, known.shape, strict=True):
        if isinstance(own, int) and own != size:
            yield f"{known.name} has the shape {array.shape}, and {_shape(known.shape)} is wanted"
            return
        if isinstance(own, str) and own.isidentifier():  # and no expression
            first, where = sizes.setdefault(own, (size, known.name))
            if first != size:
                yield f"{own} is {first} in {where} and {size} in {known.name}"


def _shape(shape: Sequence[Any]) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
