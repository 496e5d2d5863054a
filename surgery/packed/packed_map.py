"""What a quantised module stores packed, by the names that its parameters have when it is not quantised."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from surgery.packed.packed_stack import packed_stacks_of
from surgery.packed.packed_tensors import PackedTensors
from surgery.packed.packed_weight import packed_weight_of

__all__ = ["packed_by_name", "stored_in", "write_stored"]


def packed_by_name(module: nn.Module) -> Mapping[str, PackedTensors]:
    """The packed weight of a module as "weight", or its packed stacks by name; empty for other modules."""
    weight = packed_weight_of(module)
    return packed_stacks_of(module) if weight is None else {"weight": weight}


def stored_in(module: nn.Module) -> dict[str, Tensor]:
    """All codes, scales and zero points of a module by name, the stored tensors themselves."""
    return {name: tensor for packed in packed_by_name(module).values() for name, tensor in packed.tensors().items()}


def write_stored(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies values into all codes, scales and zero points of a module."""
    for packed in packed_by_name(module).values():
        packed.write(tensors)
