"""How near a result has to be: what the model's own float32 loses on this processor, and no number found on another."""

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

LARGEST = 1e-2  # above, a comparison tells nothing


class Wanted(list[T], Generic[T]):
    """What a model gives, flat, and the call that gave it: `call(model, wide)` with each tensor made `wide`."""

    def __init__(self, model: nn.Module, call: Call, as_given: Callable[[Tensor], T]):
        self.model, self.call = model, call
        super().__init__(as_given(one) for one in self._asked())

    def _asked(self) -> list[Tensor]:
        with torch.no_grad():
            return self.call(self.model, lambda tensor: tensor)

    def allowed(self, index: int, least: float) -> float:
        """Of the largest number of an output: `least`, or some times what the model is off from itself in float64."""
        again = self._asked()
        own = [difference(one, other) for one, other in zip(again, map(_tensor, self), strict=True)]
        assert not any(own), "the model is not what it was: compare while the same adapters are live"
        losses = Float64Model(self.model).losses(self.call, again)
        return least if losses is None else max(least, min(LARGEST, FACTOR * losses[index]))


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def off(have: Any, want: Any, wanted: Any, index: int, least: float) -> str | None:
    """What to say of an output that is too far away; `wanted`: all of them, a `Wanted` where they are a model's."""
    apart = difference(_tensor(want), have)
    if apart <= least:
        return None
    allowed = wanted.allowed(index, least) if isinstance(wanted, Wanted) else least
    return None if apart <= allowed else f"output {index} is {apart:.2e} off, of {allowed:.1e} that are allowed"


def assert_as(found: Tensor, expected: Tensor, model: nn.Module, least: float, *args: Any, **given: Any) -> None:
    """`least` of the largest number is allowed, or some times what the model loses when it is called with these."""

    def call(model: nn.Module, wide: Callable[[Tensor], Tensor]) -> list[Tensor]:
        values, named = pytree.tree_map(lambda one: wide(one) if isinstance(one, Tensor) else one, (args, given))
        output = model(*values, **named)
        return [output if isinstance(output, Tensor) else output[0]]

    assert found.shape == expected.shape
    if difference(expected, found) > least:
        told = off(found, expected, Wanted(model, call, lambda leaf: leaf), 0, least)
        assert told is None, told
