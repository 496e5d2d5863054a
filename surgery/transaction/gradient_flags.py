"""Sets and reads `requires_grad` for every kind of parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from surgery.transaction.undo_log import Journal

__all__ = ["is_lazy", "lazy_in", "set_flag"]


def set_flag(parameter: Tensor, flag: bool, journal: Journal | None = None) -> None:
    """Set `requires_grad`, also of lazy parameters and of parameters that were created in inference mode."""
    if parameter.requires_grad != flag:
        if journal is not None:
            journal.undo(set_flag, parameter, parameter.requires_grad)
        if is_lazy(parameter):
            parameter.requires_grad = flag
        else:
            with torch.inference_mode(parameter.is_inference()):
                parameter.requires_grad_(flag)


def is_lazy(tensor: Tensor | None) -> bool:
    """Whether a parameter or buffer does not have a shape yet: a lazy module creates it at its first call."""
    return isinstance(tensor, (UninitializedParameter, UninitializedBuffer))


def lazy_in(module: nn.Module) -> list[str]:
    """Returns the names of a module's parameters and buffers without a shape."""
    named = (*module.named_parameters(), *module.named_buffers())
    return [name for name, tensor in named if is_lazy(tensor)]
