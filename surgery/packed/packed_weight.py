"""The interface of packed weights, and the register of the classes that implement it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["BACKENDS", "PackedWeight", "packed_weight_of", "register_packed"]

W = TypeVar("W", bound="type[PackedWeight]")

# Module of the backend's class by the first part of a module's or a weight's class name. A file is imported when a
# model has such a class, and imports the backend's package then.
BACKENDS: dict[str, str] = {}
_registered: list[type[PackedWeight]] = []


class PackedWeight(ABC):
    """The packed weight of one module, such as the 4-bit weight of bitsandbytes' `Linear4bit`.

    An object of this class reads the module each time; it does not keep tensors. A subclass implements one backend.

    Attributes:
        backend: the name of the backend, such as "bitsandbytes".
        module: the quantised module.
    """

    backend: ClassVar[str]

    def __init__(self, module: nn.Module):
        self.module: Any = module

    @classmethod
    @abstractmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether the class can read this module. It looks at names of classes and does not import the backend."""

    @property
    @abstractmethod
    def layout(self) -> str:
        """The layout in words, such as "nf4, blocks of 64"."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The sizes of the dequantised weight, (out, in)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the dequantised weight, as the module's kernel computes it."""

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

    @property
    def nbytes(self) -> int:
        """The bytes of codes, scales and what else is stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors themselves (codes, scales, zero points) by name. Their bits are the weight's bits."""

    @abstractmethod
    def dequantise(self) -> Tensor:
        """A new plain tensor (out, in): the values that the module's own forward multiplies with."""

    @abstractmethod
    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        """Quantises a plain weight (out, in) in this layout, with the same settings. Changes nothing.

        Args:
            weight: the new values.
            scales: "refit" computes scales and zero points from the new values, as the backend does. "keep" uses those
                that are there.

        Returns:
            New tensors by the names of `tensors`, for `write`.
        """

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies values into the stored tensors, in place: the module's objects stay."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(tensors[name])


def register_packed(cls: W) -> W:
    """Makes a class of packed weights known to the engine, before those that the engine brings. Use as a decorator."""
    _registered.insert(0, cls)
    return cls


def packed_weight_of(module: nn.Module) -> PackedWeight | None:
    """The packed weight of a module; None for a module that is not quantised, or in a layout that is not known."""
    base = getattr(type(module), "_surgery_base", type(module))
    weight = module._parameters.get("weight")
    packages = {cls.__module__.partition(".")[0] for cls in (*base.__mro__, type(weight))}
    for package, file in BACKENDS.items():
        if package in packages:
            import_module(file)
    return next((cls(module) for cls in _registered if cls.accepts(module)), None)
