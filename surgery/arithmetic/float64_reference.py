"""Measures the rounding error of a model's own precision, with the same model in float64 as the reference.

A tolerance that suits one processor need not suit another, whose kernels add in another order. The distance of the
model from itself in float64, on the present processor, shows how much another order may differ there.
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

__all__ = ["FACTOR", "Float64Model", "difference"]

# Two orders of summation have about the same error each, and the largest of many errors varies by chance.
FACTOR = 8.0

_WIDER = {
    torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}  # fmt: skip


class Float64Model:
    """A float64 copy of a model, created at first use. Inputs and the code's casts to float32 become float64, too."""

    def __init__(self, model: nn.Module):
        self._model, self._wide_model = model, None

    def losses(
        self, call: Callable[[nn.Module, Callable[[Tensor], Tensor]], Sequence[Tensor]], outputs: Sequence[Tensor]
    ) -> list[float] | None:
        """Returns the `difference` of each output from its float64 reference, or None if float64 does not work.

        `call(model, widen)`: returns the model's outputs, flat, for the same arguments with `widen` applied to each
        tensor.
        """
        try:
            if self._wide_model is None:
                self._wide_model = copy.deepcopy(self._model).to(torch.float64).eval()
            with torch.no_grad(), torch.random.fork_rng(), _WideningMode():
                references = call(self._wide_model, _widen)
        except Exception:  # packed weights, and operations without float64 kernels
            return None
        if [tensor.shape for tensor in references] != [tensor.shape for tensor in outputs]:
            return None
        return [difference(reference, output) for reference, output in zip(references, outputs, strict=True)]


class _WideningMode(TorchFunctionMode):
    """Inside the mode, code that asks for float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(_widen_dtype, (args, kwargs or {}))
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        result = func(*args, **kwargs)
        return pytree.tree_map(_widen, result) if isinstance(result, (Tensor, tuple, list)) else result


def _widen_dtype(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def _widen(value: Any) -> Any:
    return value.to(_WIDER[value.dtype]) if isinstance(value, Tensor) and value.dtype in _WIDER else value


def difference(reference: Tensor, value: Any) -> float:
    """Returns the largest difference, divided by the largest number if that is above 1. Infinite if shapes differ.

    NaN is equal to NaN, and an infinity to an infinity of its sign. If these differ, the difference is infinite, too.
    """
    expected, actual = _array(reference), _array(value)
    if expected.shape != actual.shape or not np.array_equal(np.isnan(expected), np.isnan(actual)):
        return float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], actual[~finite], equal_nan=True) or not np.isfinite(actual[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    expected, actual = expected[finite], actual[finite]
    return float(np.abs(expected - actual).max() / max(1.0, np.abs(expected).max()))


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.to(torch.complex128) if value.is_complex() else value.double()).numpy()
    array = np.asarray(value)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
