"""fuse_gelu and fuse_silu beside torch's own functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import PlanError, apply_rules, remove
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
