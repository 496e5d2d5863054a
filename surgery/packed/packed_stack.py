"""Stacks of packed matrices: one module with several of them, such as the experts of gpt-oss in MXFP4."""

from __future__ import annotations

from abc import abstractmethod
from importlib import import_module

from torch import nn

from surgery.packed.packed_tensors import PackedTensors
from surgery.packed.quantised_class import base_of

__all__ = ["PackedStack", "packed_stacks_of"]

# The file that reads the stacks of a module, by the name of the module's class. It has a function `stacks_of`.
_FILES = {"Mxfp4GptOssExperts": "surgery.packed.mxfp4"}


class PackedStack(PackedTensors):
    """One stack of packed matrices of a module, a matrix for each expert.

    Attributes:
        module: the quantised module.
        name: the name of the parameter that the module has when it is not quantised, such as "gate_up_proj".
    """

    def __init__(self, module: nn.Module, name: str):
        super().__init__(module)
        self.name = name

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """The sizes of the dequantised stack, in the order of the module's parameter when it is not quantised."""


def packed_stacks_of(module: nn.Module) -> dict[str, PackedStack]:
    """The packed stacks of a module by name; empty for other modules, and before the weights are loaded.

    >>> from torch import nn
    >>> from surgery import packed_stacks_of
    >>> packed_stacks_of(nn.Linear(2, 2))
    {}

    Args:
        module: the module, such as transformers' `Mxfp4GptOssExperts`.
    """
    for cls in base_of(module).__mro__:
        if cls.__name__ in _FILES:
            return import_module(_FILES[cls.__name__]).stacks_of(module)
    return {}
