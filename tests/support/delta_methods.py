"""AdaLoRA, FourierFT, SHiRA, C3A and RandLoRA: rules and layers of their tests."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from surgery import Rule
from surgery.rules import AdaLoraRule, C3aRule, FourierRule, RandLoraRule, ShiraRule

foreign = pytest.mark.filterwarnings("ignore")  # PEFT's own


class Holder(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.m = module

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


def conv1d(out: int, inner: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers.pytorch_utils").Conv1D(out, inner)
    return module


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "wide": lambda: nn.Linear(12, 8),
    "tall": lambda: nn.Linear(8, 12, bias=False),
    "Conv1D": lambda: conv1d(12, 8),
}

RULES: dict[str, Rule] = {
    "adalora": AdaLoraRule("m", rank=4, alpha=6, total_step=10),
    "fourier": FourierRule("m", n_frequency=10, scaling=20.0),
    "shira": ShiraRule("m", rank=2, random_seed=3, init="random"),
    "c3a": C3aRule("m", block_size=4),
    "randlora": RandLoraRule("m", rank=3, alpha=6),
}


def disturb(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def assert_close(actual: Tensor, expected: Tensor, slack: float = 1e-6) -> None:
    """Equal to within a few float32 roundings of the largest entry: sums are taken in another order."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= slack * max(1.0, float(expected.abs().max().detach()))
