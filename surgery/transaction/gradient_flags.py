"""Whether a parameter requires gradients, for every kind of parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from surgery.transaction.undo_log import Journal

__all__ = ["is_lazy", "lazy_in", "set_flag"]


def set_flag(parameter: Tensor, flag: bool, journal: Journal | None = None) -> None:
    """`requires_grad_`, for parameters without numbers (lazy ones) and those made in inference mode, too."""
    if parameter.requires_grad != flag:
        if journal is not None:
            journal.undo(set_flag, parameter, parameter.requires_grad)
        if is_lazy(parameter):
            parameter.requires_grad = flag
        else:
            with torch.inference_mode(parameter.is_inference()):
                parameter.requires_grad_(flag)


def is_lazy(tensor: Tensor | None) -> bool:
    """Whether a parameter or buffer has no shape yet: a lazy module makes it at its first call."""
    return isinstance(tensor, (UninitializedParameter, UninitializedBuffer))


def lazy_in(module: nn.Module) -> list[str]:
    """The names of parameters and buffers inside that have no shape yet."""
    named = (*module.named_parameters(), *module.named_buffers())
    return [name for name, tensor in named if is_lazy(tensor)]
