"""fuse_layer_norm beside `F.layer_norm`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import PlanError, apply_rules, remove
from surgery.rules.rewrites import fuse_layer_norm

pytest.importorskip("transformers")
from transformers.models.cohere.modeling_cohere import CohereLayerNorm


class Norm(nn.Module):
    def __init__(self, unbiased: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.unbiased = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8)), unbiased

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = x.var(-1, keepdim=True, unbiased=self.unbiased)
        return self.weight * (centred / (variance + 1e-3).sqrt()) + self.bias


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)


def test_bits_of_the_function() -> None:
    x = torch.randn(2, 5, 8)
    for model in (Norm(), Squares()):
        before = model(x)
        apply_rules(model, fuse_layer_norm(), example_inputs=x)
        expected = (model.weight, model.bias, 1e-3) if isinstance(model, Norm) else (None, None, 1e-5)
        assert torch.equal(model(x), F.layer_norm(x, (8,), *expected)) and torch.allclose(model(x), before, atol=1e-6)
        remove(model)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("size", [8, (4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cohere(size: Any, dtype: torch.dtype) -> None:
    """The norm of queries has a weight for each head, which stays a product."""
    model, x = CohereLayerNorm(size).to(dtype), torch.randn(2, 5, 4, 8, dtype=dtype)
    nn.init.normal_(model.weight)
    before = model(x)
    apply_rules(model, fuse_layer_norm(), example_inputs=x)
    assert model(x).dtype == dtype
    assert torch.allclose(model(x), before, atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_an_unbiased_variance_is_another_function() -> None:
    with pytest.raises(PlanError):
        apply_rules(Norm(unbiased=True), fuse_layer_norm(), example_inputs=torch.randn(2, 8))
