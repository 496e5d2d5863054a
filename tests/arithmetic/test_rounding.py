"""The rounding error of a model's own precision, compared with plain float64 arithmetic, and tolerances from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from surgery import export_onnx
from surgery.arithmetic.float64_reference import FACTOR, Float64Model, difference
from surgery.onnx.calls.example import ExampleCall
from surgery.onnx.checking.output_differences import LARGEST, TOLERANCES, Call, Comparison
from tests.support.near import Wanted, off


class Cast(nn.Module):
    """Casts to float32, as transformers' norms and softmaxes do, and creates a tensor in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).float()
        y = torch.softmax(y * torch.full((), 40.0), -1, dtype=torch.float32).to(torch.float32)
        return torch.cat([y, torch.zeros(1, 64)]) @ self.a.weight


def test_what_is_lost_is_the_difference_to_float64() -> None:
    torch.manual_seed(0)
    model, x = Cast().eval(), torch.randn(5, 64)
    with torch.no_grad():
        output = model(x)
        w, b = model.a.weight.double(), model.a.bias.double()
        y = torch.softmax((x.double() @ w.T + b) * 40, -1)
        exact = torch.cat([y, torch.zeros(1, 64, dtype=torch.float64)]) @ w
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = Float64Model(model).losses(lambda model, wide: [model(wide(x))], [output])
    assert losses is not None and losses[0] == pytest.approx(difference(exact, output), rel=1e-6) and losses[0] > 1e-8
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.a.weight.dtype == torch.float32 and model(x).dtype == torch.float32


def test_what_has_no_float64_has_no_loss() -> None:
    class Only32(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise TypeError("float32 alone")
            return x

    assert Float64Model(Only32()).losses(lambda model, wide: [model(wide(torch.ones(2)))], [torch.ones(2)]) is None


class Unstable(nn.Module):
    """The difference of two sums that are ten thousand times larger: float32 loses four digits."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(256, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x + 3000.0) - self.a(torch.full_like(x, 3000.0))


def test_of_models_that_lose_much_more_is_allowed(tmp_path: Path) -> None:
    """A comparison allows the errors that another order of the sums causes. A wrong number is far beyond them."""
    torch.manual_seed(0)
    model, x = Unstable().eval(), torch.randn(4, 256)
    example = ExampleCall.of(model, x)
    with torch.no_grad():
        output = model(x)
        w = model.a.weight.double()
        loss = difference((x.double() + 3000) @ w.T - torch.full((4, 256), 3000.0, dtype=torch.float64) @ w.T, output)
    least = TOLERANCES["float32"]
    assert loss > least
    comparison = Comparison("base", model, ["output"], None)
    for error, ok in ((2 * loss, True), (FACTOR * loss * 1.1, False), (1e-1, False)):
        exported = (output + error * max(1.0, float(output.abs().max()))).numpy()
        (result,) = comparison.of(Call("", example), True, [output], [exported])
        assert result.ok == ok and (error > LARGEST["float32"] or result.lost == pytest.approx(loss, rel=1e-6))
    (result,) = Comparison("base", model, ["output"], 1e-6).of(
        Call("", example), True, [output], [output.numpy() + 1e-3]
    )
    assert result.tolerance == 1e-6 and not result.ok and not result.lost  # atol= replaces the tolerance from float64
    report = export_onnx(model, tmp_path / "m.onnx", x).parity
    assert report is not None and report.ok


def test_a_wanted_output_is_compared_while_the_model_is_the_same() -> None:
    model, x = nn.Linear(64, 8, bias=False).eval(), torch.randn(3, 64)
    reference = Wanted(model, lambda model, wide: [model(wide(x))], lambda leaf: leaf)
    assert off(reference[0].numpy(), reference[0], reference, 0, 0.0) is None
    assert off(reference[0].numpy() + np.float32(0.1), reference[0], reference, 0, 1e-6) is not None
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(AssertionError, match="not what it was"):
        off(reference[0].numpy() + np.float32(0.1), reference[0], reference, 0, 1e-6)
