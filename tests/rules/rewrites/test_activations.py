"""fuse_gelu and fuse_silu beside torch's own functions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import PlanError, apply_rules, remove, show
from surgery.rules import LoraRule
from surgery.rules.rewrites import fuse_gelu, fuse_silu

pytest.importorskip("transformers")
from transformers.activations import (
    AccurateGELUActivation,
    FastGELUActivation,
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    QuickGELUActivation,
)
from transformers.models.bloom.modeling_bloom import bloom_gelu_forward


class Bloom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return bloom_gelu_forward(x)


class Cdf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        cdf = 0.5 * (1.0 + torch.erf(x * 0.70710678))
        return x * cdf


TANH = [NewGELUActivation(), FastGELUActivation(), AccurateGELUActivation(), GELUTanh(True), Bloom()]


@pytest.mark.parametrize(
    "model, approximate", [*((model, "tanh") for model in TANH), (GELUActivation(True), "none"), (Cdf(), "none")]
)
def test_gelu_has_the_bits_of_the_function(model: nn.Module, approximate: str) -> None:
    x = torch.randn(100)
    before = model(x)
    apply_rules(model, fuse_gelu(approximate=approximate), example_inputs=x)
    assert torch.equal(model(x), F.gelu(x, approximate=approximate))
    assert torch.allclose(model(x), before, atol=1e-6)
    remove(model)
    assert torch.equal(model(x), before)


def test_the_two_forms_and_the_quick_one_are_not_mixed_up() -> None:
    x = torch.randn(5)
    wrong = [(NewGELUActivation(), "none"), (GELUActivation(True), "tanh"), (QuickGELUActivation(), "tanh")]
    for model, approximate in wrong:
        with pytest.raises(PlanError):
            apply_rules(model, fuse_gelu(approximate=approximate), example_inputs=x)
    with pytest.raises(PlanError):
        apply_rules(QuickGELUActivation(), fuse_silu(), example_inputs=x)
    with pytest.raises(ValueError, match="'none' or 'tanh'"):
        fuse_gelu(approximate="erf")


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid() * x + x / (1 + torch.exp(-x))


def test_silu() -> None:
    model, x = Swish(), torch.randn(100)
    before = model(x)
    apply_rules(model, fuse_silu(), example_inputs=x)
    assert torch.equal(model(x), F.silu(x) + F.silu(x)) and torch.allclose(model(x), before, atol=1e-6)


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x * torch.sigmoid(x), 0.5, self.training)


@pytest.mark.parametrize("training", [False, True])
def test_show_writes_each_mode_as_it_runs(training: bool) -> None:
    """The text does not depend on the model's present mode."""
    model, x = Dropping().train(training), torch.randn(3)
    apply_rules(model, fuse_silu(training="eval"), example_inputs=x)
    text = str(show(model))
    in_training, in_evaluation = text.split("if self.training:")[1].split("else:")
    assert "sigmoid" in in_training and "silu(" not in in_training
    assert "silu(" in in_evaluation and "sigmoid" not in in_evaluation


class Gated(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * torch.sigmoid(y)


def test_a_slice_of_a_rewritten_sequential_is_plain() -> None:
    """A slice calls `type(self)(…)`, and the class of a site makes modules of the own class."""
    model, x = Gated(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    expected = model[:2](x)
    apply_rules(model, [fuse_silu(), LoraRule("0", rank=2)], example_inputs=x)
    part: Any = model[:2]
    assert type(part) is Gated and type(model) is not Gated and part[0] is model[0]
    assert torch.equal(part(x), expected)
    generated: Any = type(model[0])
    assert type(generated(2, 3)) is nn.Linear
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    remove(model)
    assert torch.equal(part(x), expected)
