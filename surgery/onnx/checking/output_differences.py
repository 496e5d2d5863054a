"""Compares the outputs of one call of a file and of the model, and computes the tolerance."""

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

# Allowed differences, relative to an output's largest number, which cover another order of rounding. float32: most
# models differ by 6e-6 or less (docs/reference/onnx-models.md lists all); a wrong scale or weight gives hundreds of
# times as much.
# float64: most models compute parts in float32. Half precisions keep 11 and 8 bits, and one side rounds between
# operations that the other side fuses: some tens of the last bit.
TOLERANCES = {"float32": 5e-5, "float64": 5e-5, "float16": 2e-2, "bfloat16": 1e-1}

# If the model's own error is larger, `FACTOR` times that error is allowed, up to this limit.
LARGEST = {"float32": 1e-2, "float64": 1e-2, "float16": 1e-1, "bfloat16": 2e-1}


@dataclass(frozen=True)
class Call:
    """A call that is compared.

    `values`: how its values differ from the example's; `edge`: a difference is a notice and not an error.
    """

    sizes: str
    example: ExampleCall
    values: str = ""
    edge: bool = False


def expected_of(model: nn.Module, call: ExampleCall, seed: int = 0) -> list[Tensor] | None:
    """Returns the model's outputs as a flat list; None if the model refuses the call, such as too many positions."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return _outputs(model, call)
        except Exception:
            return None


def _outputs(model: nn.Module, call: ExampleCall) -> list[Tensor]:
    return [output.detach().clone() for output in outputs_of(call.call(model, call.copy()))]


@dataclass
class Comparison:
    """Compares one adapter's calls. Runs the model in float64 if a difference exceeds the usual tolerance."""

    name: str
    model: nn.Module
    outputs: Sequence[str]
    atol: float | None
    random_outputs: Collection[int] = ()

    def __post_init__(self) -> None:
        self._wide = Float64Model(self.model)
        self._lost: dict[int, list[float] | None] = {}

    def of(self, call: Call, optimised: bool, expected: Sequence[Tensor], outputs: Sequence[Any]) -> Iterator[Compared]:
        """Yields the comparison of each output of the file with the model's."""
        if len(expected) != len(outputs):
            what = f"the file has {len(outputs)} outputs, and the model {len(expected)}"
            raise ParityError(what, where=f"{self.name}, {call.values or call.sizes}")
        for i, (name, model_output, file_output) in enumerate(zip(self.outputs, expected, outputs, strict=True)):
            if i in self.random_outputs:
                continue
            distance = difference(model_output, file_output)
            tolerance, lost = self._allowed(call, i, expected, distance)
            yield Compared(self.name, call.sizes, optimised, name, distance, tolerance, lost, call.values, call.edge)

    def _allowed(self, call: Call, i: int, expected: Sequence[Tensor], distance: float) -> tuple[float, float]:
        """Returns the tolerance, and the model's own error if the tolerance is computed from it."""
        kind = str(expected[i].dtype).removeprefix("torch.")
        least = TOLERANCES.get(kind, 0.0)
        if least and self.atol is not None:
            return self.atol, 0.0
        if not least or distance <= least or distance > LARGEST[kind]:
            return least, 0.0
        if id(call) not in self._lost:

            def outputs(model: nn.Module, wide: Callable[[Tensor], Tensor]) -> list[Tensor]:
                return _outputs(model, call.example.mapped(lambda _, tensor: wide(tensor)))

            self._lost[id(call)] = self._wide.losses(outputs, expected)
        losses = self._lost[id(call)]
        if losses is None:
            return least, 0.0
        return max(least, min(LARGEST[kind], FACTOR * losses[i])), losses[i]
