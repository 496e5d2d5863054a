"""Real dtypes of complex dtypes, and complex tensors that are filled with real numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["filled_by_reals", "is_number", "narrow", "real_of"]


def is_number(value: Tensor | torch.dtype) -> bool:
    """Whether a tensor or dtype has floating-point or complex numbers, which can be added, scaled and trained."""
    dtype = value.dtype if isinstance(value, Tensor) else value
    return dtype.is_floating_point or dtype.is_complex


def narrow(tensor: Tensor) -> bool:
    """Whether a tensor has a dtype of quantised weights: integers, or floating-point numbers of one byte."""
    return not is_number(tensor) or tensor.element_size() < 2


def real_of(dtype: torch.dtype) -> torch.dtype:
    """Returns the real dtype of a complex dtype's parts. Other dtypes are returned as they are."""
    return dtype.to_real() if dtype.is_complex else dtype


def filled_by_reals(fill: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Extend a function that fills tensors to complex tensors, which get real numbers, as in PEFT."""

    def fill_any(tensor: Tensor) -> Any:
        if not tensor.is_complex():
            return fill(tensor)
        real = torch.empty(tensor.shape, dtype=real_of(tensor.dtype), device=tensor.device)
        fill(real)
        return tensor.copy_(real)

    return fill_any
