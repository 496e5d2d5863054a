"""Functions that generated code calls: they convert dtypes, apply adapter weights, and look up tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.complex_numbers import is_number
from surgery.errors import SiteError

__all__ = ["describe", "detached", "in_dtype", "same_dtype", "tensor_of", "weighted"]


def same_dtype(new: Any, old: Any) -> Any:
    """Cast `new` to the dtype of `old`, if both are floating-point or both complex tensors."""
    if isinstance(new, Tensor) and isinstance(old, Tensor) and new.dtype != old.dtype:
        if is_number(new) and new.is_complex() == old.is_complex() and is_number(old):
            return new.to(old.dtype)
    return new


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Cast a floating-point tensor to a dtype, or a complex tensor to a complex dtype. Other values stay."""
    if (
        isinstance(value, Tensor)
        and value.dtype != dtype
        and is_number(value)
        and value.is_complex() == dtype.is_complex
    ):
        return value.to(dtype)
    return value


def detached(value: Any) -> Any:
    """Detach a tensor. Other values stay."""
    return value.detach() if isinstance(value, Tensor) else value


def weighted(old: Any, new: Any, weight: float) -> Any:
    """Multiply the difference of `new` from `old` by a weight, also for each tensor in tuples, lists and mappings."""
    if new is old or new is None:
        return new
    if isinstance(new, Tensor):
        if not (isinstance(old, Tensor) and old.shape == new.shape and is_number(new)):
            raise SiteError(
                f"an adapter's weight is {weight}, but its change can't be multiplied",
                why=f"a tensor {tuple(new.shape)} of {new.dtype} replaces {describe(old)}",
                fix="activate it with weight 1, or set scalable = False in the rule",
            )
        return torch.lerp(old.to(new.dtype), new, weight)
    if isinstance(new, (tuple, list)):
        items = [weighted(before, after, weight) for before, after in zip(old, new, strict=True)]
        return type(new)(*items) if hasattr(new, "_fields") else type(new)(items)
    if isinstance(new, Mapping):
        items_by_name = {name: weighted(old[name], value, weight) for name, value in new.items()}
        return items_by_name if type(new) is dict else type(new)(**items_by_name)  # type: ignore[call-arg]
    return new


def describe(value: Any) -> str:
    """Describes a value in an error: a tensor by shape and dtype, others by type."""
    return f"one {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def tensor_of(site: nn.Module, name: str, adapter: str | None = None) -> Tensor:
    """Returns `site.<name>` or `site.adapters.<adapter>.<name>` in a tenth of the time of attribute access.

    nn.Module looks up an attribute in Python after normal access has failed, which takes a microsecond. If a tensor is
    not a parameter at present (in DataParallel's replicas, or sharded), normal access is used.
    """
    owner: Any = site if adapter is None else site._modules["adapters"]._modules[adapter]  # type: ignore[union-attr]
    parameter = owner._parameters.get(name)
    return parameter if parameter is not None else getattr(owner, name)
