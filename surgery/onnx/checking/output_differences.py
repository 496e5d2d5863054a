"""One call's outputs, of a file and of the model, and how far apart they may be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.arithmetic.float64_reference import FACTOR, Float64Model, difference
from surgery.errors import ParityError
from surgery.onnx.calls.example import ExampleCall, outputs_of
from surgery.onnx.checking.report import Compared

__all__ = ["TOLERANCES", "Call", "Comparison", "expected_of"]

# What rounding in another order comes to in models that lose little, of the largest number of an output. float32: 6e-6
# and less in most (docs/onnx.md has them all); a wrong scale or weight is hundreds of times as much. float64 has parts
# in float32 in most models. The half precisions keep 11 and 8 bits, and are rounded between operations that the other
# side fuses: some tens of their last.
TOLERANCES = {"float32": 5e-5, "float64": 5e-5, "float16": 2e-2, "bfloat16": 1e-1}

# Of a model that loses more, `FACTOR` times what it loses itself is allowed, up to this: above, equal tells nothing.
LARGEST = {"float32": 1e-2, "float64": 1e-2, "float16": 1e-1, "bfloat16": 2e-1}


@dataclass(frozen=True)
class Call:
    """A call that is compared; `values`: what is other in its tensors than in the example, `edge`: a case in which the
    file may part from the model, which is told and no error."""

    sizes: str
    given: ExampleCall
    values: str = ""
    edge: bool = False


def expected_of(model: nn.Module, call: ExampleCall, seed: int = 0) -> list[Tensor] | None:
    """What the model gives, flat; None where it can't be called so, such as with positions past the last one."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return _called(model, call)
        except Exception:
            return None


def _called(model: nn.Module, call: ExampleCall) -> list[Tensor]:
    return [output.detach().clone() for output in outputs_of(call.call(model, call.copy()))]


@dataclass
class Comparison:
    """Of one adapter's calls; the model is asked in float64 where a difference is more than most models lose."""

    name: str
    model: nn.Module
    outputs: Sequence[str]
    atol: float | None
    drawn: Collection[int] = ()

    def __post_init__(self) -> None:
        self._wide = Float64Model(self.model)
        self._lost: dict[int, list[float] | None] = {}

    def of(self, call: Call, optimised: bool, expected: Sequence[Tensor], found: Sequence[Any]) -> Iterator[Compared]:
        """What is compared of these outputs of the file."""
        if len(expected) != len(found):
            what = f"the file has {len(found)} outputs, and the model {len(expected)}"
            raise ParityError(what, where=f"{self.name}, {call.values or call.sizes}")
        for i, (output, want, have) in enumerate(zip(self.outputs, expected, found, strict=True)):
            if i in self.drawn:
                continue
            off = difference(want, have)
            tolerance, lost = self._allowed(call, i, expected, off)
            yield Compared(self.name, call.sizes, optimised, output, off, tolerance, lost, call.values, call.edge)

    def _allowed(self, call: Call, i: int, expected: Sequence[Tensor], off: float) -> tuple[float, float]:
        """What is allowed, and what the model itself loses where it was asked."""
        kind = str(expected[i].dtype).removeprefix("torch.")
        least = TOLERANCES.get(kind, 0.0)
        if least and self.atol is not None:
            return self.atol, 0.0
        if not least or off <= least or off > LARGEST[kind]:
            return least, 0.0
        if id(call) not in self._lost:

            def outputs(model: nn.Module, wide: Callable[[Tensor], Tensor]) -> list[Tensor]:
                return _called(model, call.given.mapped(lambda _, tensor: wide(tensor)))

            self._lost[id(call)] = self._wide.losses(outputs, expected)
        losses = self._lost[id(call)]
        if losses is None:
            return least, 0.0
        return max(least, min(LARGEST[kind], FACTOR * losses[i])), losses[i]
