"""What a model's own precision loses: the same model in float64 is the reference.

A tolerance that was found on one processor need not hold on another, whose kernels add in another order. How far the
model is from itself in float64, on the processor at hand, tells how much another order may differ there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["FACTOR", "Wide", "difference"]

# Two orders of summation each lose about as much as one, and the largest of many numbers is a matter of chance.
FACTOR = 8.0

_WIDER = {
    torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}  # fmt: skip


class Wide:
    """A model in float64, made when it is first asked: weights, inputs and what its code casts to float32."""

    def __init__(self, model: nn.Module):
        self._model, self._made = model, None

    def losses(
        self, call: Callable[[nn.Module, Callable[[Tensor], Tensor]], Sequence[Tensor]], outputs: Sequence[Tensor]
    ) -> list[float] | None:
        """How far each of these outputs is from its own in float64 (see `difference`); None where that can't be told.

        `call(model, wide)`: what the model gives, flat, of the same arguments with each tensor made `wide`.
        """
        try:
            if self._made is None:
                self._made = copy.deepcopy(self._model).to(torch.float64).eval()
            with torch.no_grad(), torch.random.fork_rng(), _Widened():
                found = call(self._made, _wide)
        except Exception:  # operations that float64 has no kernels for, and packed weights
            return None
        if [one.shape for one in found] != [one.shape for one in outputs]:
            return None
        return [difference(want, have) for want, have in zip(found, outputs, strict=True)]


class _Widened(TorchFunctionMode):
    """Whoever asks for float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(_asked, (args, kwargs or {}))
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        found = func(*args, **kwargs)
        return pytree.tree_map(_wide, found) if isinstance(found, (Tensor, tuple, list)) else found


def _asked(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def _wide(value: Any) -> Any:
    return value.to(_WIDER[value.dtype]) if isinstance(value, Tensor) and value.dtype in _WIDER else value


def difference(want: Tensor, have: Any) -> float:
    """The largest difference, of the largest number where that is above 1; infinite where shapes or NaNs differ.

    A NaN is equal to a NaN, and an infinity to one of its sign.
    """
    expected, found = _array(want), _array(have)
    if expected.shape != found.shape or not np.array_equal(np.isnan(expected), np.isnan(found)):
        return float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], found[~finite], equal_nan=True) or not np.isfinite(found[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    expected, found = expected[finite], found[finite]
    return float(np.abs(expected - found).max() / max(1.0, np.abs(expected).max()))


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.to(torch.complex128) if value.is_complex() else value.double()).numpy()
    array = np.asarray(value)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
