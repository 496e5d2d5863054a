"""Complex numbers: which real dtype lies under a complex one, and tensors that are filled with real numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["filled_by_reals", "is_number", "narrow", "real_of"]


def is_number(value: Tensor | torch.dtype) -> bool:
    """Whether it holds floating-point or complex numbers, which can be added to, scaled and trained."""
    dtype = value.dtype if isinstance(value, Tensor) else value
    return dtype.is_floating_point or dtype.is_complex


def narrow(tensor: Tensor) -> bool:
    """Whether its dtype is one of quantised weights: whole numbers, or floating-point ones of a byte."""
    return not is_number(tensor) or tensor.element_size() < 2


def real_of(dtype: torch.dtype) -> torch.dtype:
    """The real dtype of a complex one's parts; any other as it is."""
    return dtype.to_real() if dtype.is_complex else dtype


def filled_by_reals(fill: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """What fills a tensor with random numbers, for complex tensors too: real ones, as PEFT starts them."""

    def filled(tensor: Tensor) -> Any:
        if not tensor.is_complex():
            return fill(tensor)
        real = torch.empty(tensor.shape, dtype=real_of(tensor.dtype), device=tensor.device)
        fill(real)
        return tensor.copy_(real)

    return filled
