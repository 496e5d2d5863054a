"""A tensor in a file that is read later, with conversions that are computed when it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.adapter_files.tensor_files import TensorFile

__all__ = ["FileTensor", "LazyTensors", "tensor_of"]


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


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for, so that one at a time is in memory."""

    def __init__(self, tensors: Mapping[str, FileTensor]):
        self.tensors = tensors

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def tensor_of(file: TensorFile, key: str) -> FileTensor:
    return FileTensor(tuple(file.shapes[key]), file.dtypes[key], lambda: file.read(key), key)
