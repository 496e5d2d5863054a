"""What packed weights and packed stacks have in common: the stored tensors of a module, read and written in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

__all__ = ["PackedTensors"]


class PackedTensors(ABC):
    """Numbers that a module stores packed: codes, scales and zero points.

    An object of this class reads the module each time; it does not keep tensors.

    Attributes:
        backend: the name of the backend, such as "bitsandbytes".
        auxiliary: names of further tensors and attributes of the module that are the backend's, beside those in
            `tensors`. While the module is plain, it does not have them.
    """

    backend: ClassVar[str]
    auxiliary: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, module: nn.Module):
        self.module: Any = module

    @property
    @abstractmethod
    def layout(self) -> str:
        """The layout in words, such as "nf4, blocks of 64"."""

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
        """A new plain tensor: the values that the module's own forward multiplies with."""

    @abstractmethod
    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        """Quantises plain numbers of the shape of `dequantise`, with the settings of the layout. Changes nothing.

        Args:
            weight: the new values.
            scales: "refit" computes scales and zero points from the new values, as the backend does. "keep" uses those
                that are there.

        Returns:
            New tensors by the names of `tensors`, for `write`.
        """

    def rounded(self, weight: Tensor) -> Tensor:
        """The values that a plain weight has after it is quantised in this layout. Changes nothing."""
        before = {name: tensor.detach().clone() for name, tensor in self.tensors().items()}
        try:
            self.write(self.requantise(weight))
            return self.dequantise()
        finally:
            self.write(before)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies values into the stored tensors, in place: the module's objects stay."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                with torch.inference_mode(tensor.is_inference()):  # HQQ makes such tensors, which others can't write
                    tensor.copy_(tensors[name])
