"""Functions that generated code calls between a rule's lines: dtypes, weights, and tensors found quickly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.arithmetic.complex_numbers import is_number
from surgery.errors import SiteError

__all__ = ["described", "detached", "in_dtype", "same_dtype", "tensor_of", "weighted"]


def same_dtype(new: Any, old: Any) -> Any:
    """`new` in the dtype of `old`, where both are floating-point or both complex tensors; anything else as it is."""
    if isinstance(new, Tensor) and isinstance(old, Tensor) and new.dtype != old.dtype:
        if is_number(new) and new.is_complex() == old.is_complex() and is_number(old):
            return new.to(old.dtype)
    return new


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor in a dtype, a complex one in a complex dtype; anything else as it is."""
    if (
        isinstance(value, Tensor)
        and value.dtype != dtype
        and is_number(value)
        and value.is_complex() == dtype.is_complex
    ):
        return value.to(dtype)
    return value


def detached(value: Any) -> Any:
    """A tensor without its history, as under `torch.no_grad`; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def weighted(old: Any, new: Any, weight: float) -> Any:
    """`new`, with its difference from `old` multiplied; in tuples, lists and mappings, each tensor of it."""
    if new is old or new is None:
        return new
    if isinstance(new, Tensor):
        if not (isinstance(old, Tensor) and old.shape == new.shape and is_number(new)):
            raise SiteError(
                f"an adapter's weight is {weight}, and what it changes can't be multiplied",
                why=f"a tensor {tuple(new.shape)} of {new.dtype} stands in the place of {described(old)}",
                fix="activate it with weight 1, or say scalable = False in the rule",
            )
        return torch.lerp(old.to(new.dtype), new, weight)
    if isinstance(new, (tuple, list)):
        items = [weighted(one, other, weight) for one, other in zip(old, new, strict=True)]
        return type(new)(*items) if hasattr(new, "_fields") else type(new)(items)
    if isinstance(new, Mapping):
        found = {name: weighted(old[name], value, weight) for name, value in new.items()}
        return found if type(new) is dict else type(new)(**found)  # type: ignore[call-arg]
    return new


def described(value: Any) -> str:
    return f"one {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def tensor_of(site: nn.Module, name: str, adapter: str | None = None) -> Tensor:
    """`site.<name>` or `site.adapters.<adapter>.<name>`: the same tensor, found in a tenth of the time.

    nn.Module looks an attribute up in Python after the ordinary way has failed, a microsecond each. Where a tensor is
    no parameter at the moment (in DataParallel's replicas, or sharded), the ordinary way finds it.
    """
    owner: Any = site if adapter is None else site._modules["adapters"]._modules[adapter]  # type: ignore[union-attr]
    found = owner._parameters.get(name)
    return found if found is not None else getattr(owner, name)
