"""Weights that are held in another form than a plain tensor: quantised by bitsandbytes, torchao and their like."""

from __future__ import annotations

from torch import Tensor, nn

from surgery.arithmetic.complex_numbers import narrow

__all__ = ["UNPACKED", "is_packed", "packed_in"]

UNPACKED = (
    "work on the base as it was before it was quantised: load that one, put the adapter on it, "
    "merge_to(model, folder), and quantise what that writes"
)


def is_packed(tensor: Tensor | None) -> bool:
    """Whether a parameter's numbers are not simply there: a subclass that packs them, integers, bytes. Not: sharded."""
    if tensor is None or hasattr(tensor, "device_mesh"):
        return False
    return type(tensor) not in (nn.Parameter, Tensor) or narrow(tensor)


def packed_in(module: nn.Module) -> str | None:
    """Which of a module's own parameters are packed, and as what; None where none is."""
    found = [(name, tensor) for name, tensor in module._parameters.items() if tensor is not None and is_packed(tensor)]
    if not found:
        return None
    names = ", ".join(name for name, _ in found)
    kind = type(found[0][1]).__name__
    return f"{names} is a {kind if kind != 'Parameter' else found[0][1].dtype}"
