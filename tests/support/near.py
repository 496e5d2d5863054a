"""Computes tolerances from the model's own float32 error on this processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.arithmetic.float64_reference import FACTOR, Float64Model, difference

T = TypeVar("T", np.ndarray, Tensor)
Call = Callable[[nn.Module, Callable[[Tensor], Tensor]], list[Tensor]]

LARGEST = 1e-2  # above this, a comparison shows nothing


class Wanted(list[T], Generic[T]):
    """A model's outputs as a flat list, and the call that computes them: `call(model, wide)` widens each tensor."""

    def __init__(self, model: nn.Module, call: Call, as_given: Callable[[Tensor], T]):
        self.model, self.call = model, call
        super().__init__(as_given(tensor) for tensor in self._compute())

    def _compute(self) -> list[Tensor]:
        with torch.no_grad():
            return self.call(self.model, lambda tensor: tensor)

    def allowed(self, index: int, least: float) -> float:
        """Relative to an output's largest number: `least`, or a multiple of the model's error against float64."""
        again = self._compute()
        own = [difference(actual, other) for actual, other in zip(again, map(_tensor, self), strict=True)]
        assert not any(own), "the model is not what it was: compare while the same adapters are live"
        losses = Float64Model(self.model).losses(self.call, again)
        return least if losses is None else max(least, min(LARGEST, FACTOR * losses[index]))


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def off(have: Any, want: Any, wanted: Any, index: int, least: float) -> str | None:
    """Return a message for an output that is too far away. `wanted`: all expected outputs."""
    apart = difference(_tensor(want), have)
    if apart <= least:
        return None
    allowed = wanted.allowed(index, least) if isinstance(wanted, Wanted) else least
    return None if apart <= allowed else f"output {index} is {apart:.2e} off, of {allowed:.1e} that are allowed"


def assert_as(actual: Tensor, expected: Tensor, model: nn.Module, least: float, *args: Any, **kwargs: Any) -> None:
    """The tolerance: `least` of the largest number, or a multiple of the model's own error for this call."""

    def call(model: nn.Module, wide: Callable[[Tensor], Tensor]) -> list[Tensor]:
        values, named = pytree.tree_map(lambda leaf: wide(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        output = model(*values, **named)
        return [output if isinstance(output, Tensor) else output[0]]

    assert actual.shape == expected.shape
    if difference(expected, actual) > least:
        message = off(actual, expected, Wanted(model, call, lambda leaf: leaf), 0, least)
        assert message is None, message
