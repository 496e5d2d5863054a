"""What a model's own precision loses, against plain float64 arithmetic; and what a comparison allows of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from surgery import export_onnx
from surgery.arithmetic.float64_reference import FACTOR, Wide, difference
from surgery.onnx.calls.example import ExampleCall
from surgery.onnx.checking.output_differences import LARGEST, TOLERANCES, Call, Comparison
from tests.support.near import Wanted, off


class Cast(nn.Module):
    """As transformers' norms and softmaxes do, it casts to float32; and it makes a tensor of its own."""

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
        found = model(x)
        w, b = model.a.weight.double(), model.a.bias.double()
        y = torch.softmax((x.double() @ w.T + b) * 40, -1)
        exact = torch.cat([y, torch.zeros(1, 64, dtype=torch.float64)]) @ w
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = Wide(model).losses(lambda model, wide: [model(wide(x))], [found])
    assert losses is not None and losses[0] == pytest.approx(difference(exact, found), rel=1e-6) and losses[0] > 1e-8
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.a.weight.dtype == torch.float32 and model(x).dtype == torch.float32


def test_what_has_no_float64_has_no_loss() -> None:
    class Only32(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise TypeError("float32 alone")
            return x

    assert Wide(Only32()).losses(lambda model, wide: [model(wide(torch.ones(2)))], [torch.ones(2)]) is None


class Unstable(nn.Module):
    """The difference of two sums that are ten thousand times as large: float32 loses four digits."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(256, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x + 3000.0) - self.a(torch.full_like(x, 3000.0))


def test_of_models_that_lose_much_more_is_allowed(tmp_path: Path) -> None:
    """The file is off by what another order of the sums brings; a wrong number is far beyond."""
    torch.manual_seed(0)
    model, x = Unstable().eval(), torch.randn(4, 256)
    given = ExampleCall.of(model, x)
    with torch.no_grad():
        found = model(x)
        w = model.a.weight.double()
        lost = difference((x.double() + 3000) @ w.T - torch.full((4, 256), 3000.0, dtype=torch.float64) @ w.T, found)
    least = TOLERANCES["float32"]
    assert lost > least
    comparison = Comparison("base", model, ["output"], None)
    for away, ok in ((2 * lost, True), (FACTOR * lost * 1.1, False), (1e-1, False)):
        have = (found + away * max(1.0, float(found.abs().max()))).numpy()
        (one,) = comparison.of(Call("", given), True, [found], [have])
        assert one.ok == ok and (away > LARGEST["float32"] or one.lost == pytest.approx(lost, rel=1e-6))
    (one,) = Comparison("base", model, ["output"], 1e-6).of(Call("", given), True, [found], [found.numpy() + 1e-3])
    assert one.tolerance == 1e-6 and not one.ok and not one.lost  # atol= takes its place
    report = export_onnx(model, tmp_path / "m.onnx", x).parity
    assert report is not None and report.ok


def test_a_wanted_output_is_compared_while_the_model_is_the_same() -> None:
    model, x = nn.Linear(64, 8, bias=False).eval(), torch.randn(3, 64)
    wanted = Wanted(model, lambda model, wide: [model(wide(x))], lambda leaf: leaf)
    assert off(wanted[0].numpy(), wanted[0], wanted, 0, 0.0) is None
    assert off(wanted[0].numpy() + np.float32(0.1), wanted[0], wanted, 0, 1e-6) is not None
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(AssertionError, match="not what it was"):
        off(wanted[0].numpy() + np.float32(0.1), wanted[0], wanted, 0, 1e-6)
