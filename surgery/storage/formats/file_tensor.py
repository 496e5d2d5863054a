"""A tensor in a file that is read later, with conversions that are computed when it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.adapter_files.tensor_files import TensorFile

__all__ = ["FileTensor", "tensor_of"]


@dataclass(frozen=True)
class FileTensor:
    """A tensor's shape and dtype, a function that reads it, and its key for messages."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    key: str = ""

    def convert(self, function: Callable[[Tensor], Tensor]) -> FileTensor:
        """The tensor after a conversion. Its shape is computed on the meta device, without numbers."""
        made = function(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return FileTensor(tuple(made.shape), made.dtype, lambda: function(self.read()), self.key)

    @staticmethod
    def of(tensor: Tensor, key: str = "") -> FileTensor:
        return FileTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor, key)


def tensor_of(file: TensorFile, key: str) -> FileTensor:
    return FileTensor(tuple(file.shapes[key]), file.dtypes[key], lambda: file.read(key), key)
