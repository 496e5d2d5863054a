"""fuse_rms_norm beside `F.rms_norm` called by hand, and the norms of transformers in several dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import PlanError, apply_rules, remove
from surgery.rules.rewrites import fuse_rms_norm
from tests.support.families import FAMILIES

pytest.importorskip("transformers")
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

NORMS = [GemmaRMSNorm, Gemma4RMSNorm, LlamaRMSNorm, Olmo2RMSNorm, T5LayerNorm]


def make_norm(kind: Any) -> nn.Module:
    norm = kind(16)
    nn.init.normal_(norm.weight)
    return norm


def by_hand(norm: Any, x: Tensor) -> Tensor:
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    weight = 1 + norm.weight.float() if isinstance(norm, GemmaRMSNorm) else norm.weight
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@pytest.mark.parametrize("kind", NORMS)
def test_norms_of_transformers(kind: type[nn.Module]) -> None:
    norm, x = make_norm(kind), torch.randn(2, 5, 16)
    before = norm(x)
    apply_rules(norm, fuse_rms_norm(), example_inputs=x)
    assert torch.equal(norm(x), by_hand(norm, x)) and torch.allclose(norm(x), before, atol=1e-6)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    norm(leaf).square().sum().backward()
    remove(norm)
    norm(other).square().sum().backward()
    assert torch.equal(norm(x), before)
    assert leaf.grad is not None and other.grad is not None
    assert torch.allclose(leaf.grad, other.grad, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", NORMS)
def test_half_precision_keeps_the_upcast(kind: type[nn.Module], dtype: torch.dtype) -> None:
    norm, x = make_norm(kind).to(dtype), torch.randn(2, 5, 16, dtype=dtype)
    before = norm(x)
    apply_rules(norm, fuse_rms_norm(), example_inputs=x)
    assert norm(x).dtype == before.dtype
    # Both round the same float32 numbers, which may differ in their own last bit.
    assert torch.allclose(norm(x), before, rtol=torch.finfo(dtype).eps, atol=0)
    remove(norm)
    apply_rules(norm, fuse_rms_norm(upcast=False), example_inputs=x)
    # The weight is multiplied before the one rounding: two units in the last place.
    assert torch.allclose(norm(x), before, rtol=3 * torch.finfo(dtype).eps, atol=0)


class Division(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)


class Gated(nn.Module):
    """The factor is not a weight of the last size, so it stays a product."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gate * (x * (x**2).mean(dim=-1, keepdim=True).add(1e-5).pow(-0.5))


@pytest.mark.parametrize("model, count", [(Division(), 1), (Gated(), 2)])
def test_other_forms(model: nn.Module, count: int) -> None:
    inputs = [torch.randn(2, 5, 16) for _ in range(count)]
    before = model(*inputs)
    apply_rules(model, fuse_rms_norm(), example_inputs=tuple(inputs))
    expected = F.rms_norm(inputs[0], (16,), None, 1e-5) * (inputs[1] if count == 2 else 1)
    assert torch.equal(model(*inputs), expected) and torch.allclose(expected, before, atol=1e-6)


class Dropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(F.dropout(x, 0.5).pow(2).mean(-1, keepdim=True) + 1e-5)


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("model", [Dropped(), Detached()])
def test_a_dropout_or_a_detach_inside_is_not_lost(model: nn.Module) -> None:
    with pytest.raises(PlanError):
        apply_rules(model, fuse_rms_norm(), example_inputs=torch.randn(2, 16))


def test_a_whole_model() -> None:
    family = FAMILIES["llama"]
    model, example = family.make().eval(), family.inputs()
    before = model(**example).logits
    apply_rules(model, fuse_rms_norm(), example_inputs=example)
    assert torch.allclose(model(**example).logits, before, atol=1e-6)
    remove(model)
    assert torch.equal(model(**example).logits, before)
