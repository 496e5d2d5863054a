"""Stacks of packed matrices: one module with several of them, such as the experts of gpt-oss in MXFP4."""

from __future__ import annotations

from abc import abstractmethod
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from surgery.packed.packed_tensors import PackedTensors
from surgery.packed.quantised_class import base_of

__all__ = ["PackedStack", "attributes_of_sites", "packed_stacks_of", "plain_experts"]

# The file that reads the stacks of a module, by the name of the module's class. It has the functions `stacks_of` and
# `plain_experts`, and perhaps `ATTRIBUTES`.
_FILES = {
    "Mxfp4GptOssExperts": "surgery.packed.mxfp4",
    "FP8Experts": "surgery.packed.fp8_experts",
    "FbgemmFp8Llama4TextExperts": "surgery.packed.fp8_experts",
}
TORCHAO = frozenset({"Int8Tensor", "Float8Tensor", "Int4Tensor"})  # the classes of its tensors that can be stacks
# The same by the class of a parameter, which a module of any class may have.
_FILES_OF_PARAMETERS = dict.fromkeys(TORCHAO, "surgery.packed.torchao_stack")


class PackedStack(PackedTensors):
    """One stack of packed matrices of a module, a matrix for each expert.

    Attributes:
        module: the quantised module.
        name: the name of the parameter that the module has when it is not quantised, such as "gate_up_proj".
        transposed: the module's `is_transposed` when it is not quantised: whether it says that a matrix is (in, out).
    """

    transposed: bool = False

    def __init__(self, module: nn.Module, name: str):
        super().__init__(module)
        self.name = name

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """The sizes of the dequantised stack, in the order of the module's parameter when it is not quantised."""

    def dequantise_experts(self, experts: Tensor) -> Tensor:
        """The dequantised matrices of some experts, by their numbers (a vector)."""
        return self.dequantise()[experts]


def packed_stacks_of(module: nn.Module) -> dict[str, PackedStack]:
    """The packed stacks of a module by name; empty for other modules, and before the weights are loaded.

    >>> from torch import nn
    >>> from surgery import packed_stacks_of
    >>> packed_stacks_of(nn.Linear(2, 2))
    {}

    Args:
        module: the module, such as transformers' `Mxfp4GptOssExperts`.
    """
    file = _file_of(base_of(module)) or _file_by_parameters(module)
    return {} if file is None else file.stacks_of(module)


def plain_experts(module: nn.Module) -> nn.Module:
    """A new module of the class that a module with packed stacks has when it is not quantised. Its tensors are meta."""
    file = _file_of(base_of(module)) or _file_by_parameters(module)
    assert file is not None
    return file.plain_experts(module)


def attributes_of_sites(base: type[nn.Module]) -> MappingProxyType[str, Any]:
    """What a class with rewritten `forward` must say so that the modules around it call that forward."""
    file = _file_of(base)
    return MappingProxyType(getattr(file, "ATTRIBUTES", {}))


def _file_of(base: type[nn.Module]) -> ModuleType | None:
    if base not in _known:
        _known[base] = next((_FILES[cls.__name__] for cls in base.__mro__ if cls.__name__ in _FILES), None)
    name = _known[base]
    return None if name is None else import_module(name)


def _file_by_parameters(module: nn.Module) -> ModuleType | None:
    """The file that reads a module by the classes of its parameters."""
    names = (_FILES_OF_PARAMETERS.get(type(tensor).__name__) for tensor in module._parameters.values())
    name = next(filter(None, names), None)
    return None if name is None else import_module(name)


_known: WeakKeyDictionary[type, str | None] = WeakKeyDictionary()
