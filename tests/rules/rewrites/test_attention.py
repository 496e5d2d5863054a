"""fuse_attention beside `F.scaled_dot_product_attention` called by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import PlanError, apply_rules, explain, remove
from surgery.rules.rewrites import fuse_attention
from tests.support.tiny import bert, gpt2, llama, t5

sdpa = F.scaled_dot_product_attention


def heads(count: int = 4) -> Tensor:
    return torch.randn(2, count, 5, 8)


MASK = torch.randn(2, 1, 5, 5)
HIDDEN = torch.rand(2, 1, 5, 5) < 0.3
HIDDEN[..., 0] = False


def bias(q: Tensor) -> Tensor:
    return torch.arange(8.0).view(8, 1, 1).expand(8, 1, 5).to(q)


class Plain(nn.Module):
    """A module whose forward is a function of its inputs."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.drop = function, nn.Dropout(0.3)
        self.register_buffer("mask", MASK)
        self.register_buffer("hidden", HIDDEN)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "no scale": (lambda _, q, k, v: (q @ k.mT).softmax(-1) @ v, lambda q, k, v: sdpa(q, k, v, scale=1.0)),
    "divisor": (
        lambda _, q, k, v: torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(8), -1) @ v,
        lambda q, k, v: sdpa(q, k, v, scale=1 / math.sqrt(8)),
    ),
    "einsum": (
        lambda _, q, k, v: torch.einsum("bhst,bhtd->bhsd", torch.einsum("bhsd,bhtd->bhst", q, k).softmax(-1), v),
        lambda q, k, v: sdpa(q, k, v, scale=1.0),
    ),
    "exponentials": (
        lambda _, q, k, v: (e := torch.exp(q @ k.mT)) / e.sum(-1, keepdim=True) @ v,
        lambda q, k, v: sdpa(q, k, v, scale=1.0),
    ),
    "scaled queries": (lambda _, q, k, v: (q / 2 @ k.mT).softmax(-1) @ v, lambda q, k, v: sdpa(q / 2, k, v, scale=1.0)),
    "keys in columns": (
        lambda _, q, k, v: (q @ k.permute(0, 1, 3, 2).contiguous()).softmax(-1) @ v,
        lambda q, k, v: sdpa(q, k, v, scale=1.0),
    ),
    "mask": (
        lambda m, q, k, v: (q @ k.mT * 0.5 + m.mask).softmax(-1) @ v,
        lambda q, k, v: sdpa(q, k, v, MASK, scale=0.5),
    ),
    "bias and mask": (
        lambda m, q, k, v: (m.mask[:1] + q @ k.mT * 0.5 + m.mask).softmax(-1) @ v,
        lambda q, k, v: sdpa(q, k, v, MASK[:1] + MASK, scale=0.5),
    ),
    "masked_fill": (
        lambda m, q, k, v: (q @ k.mT).masked_fill(m.hidden, float("-inf")).softmax(-1) @ v,
        lambda q, k, v: sdpa(q, k, v, ~HIDDEN, scale=1.0),
    ),
    "where": (
        lambda m, q, k, v: torch.where(~m.hidden, q @ k.mT, -1e30).softmax(-1) @ v,
        lambda q, k, v: sdpa(q, k, v, ~HIDDEN, scale=1.0),
    ),
    "causal": (
        lambda _, q, k, v: (q @ k.mT).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf")).softmax(-1) @ v,
        lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=1.0),
    ),
    "causal by tril": (
        lambda _, q, k, v: (q @ k.mT).masked_fill(torch.tril(torch.ones(5, 5)) == 0, float("-inf")).softmax(-1) @ v,
        lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=1.0),
    ),
    "causal by a sum": (
        lambda _, q, k, v: (q @ k.mT + torch.full((5, 5), float("-inf")).triu(1)).softmax(-1) @ v,
        lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=1.0),
    ),
    "temperature of each head": (
        lambda m, q, k, v: (q @ k.mT * m.mask[0, 0, 0, :4].view(4, 1, 1)).softmax(-1) @ v,
        lambda q, k, v: sdpa(q * MASK[0, 0, 0, :4].view(4, 1, 1), k, v, scale=1.0),
    ),
    "heads apart for the mask": (
        lambda m, q, k, v: (
            ((q.flatten(0, 1) @ k.flatten(0, 1).mT).view(2, 4, 5, 5) + m.mask).view(8, 5, 5).softmax(-1)
            @ v.flatten(0, 1)
        ),
        lambda q, k, v: sdpa(q, k, v, MASK, scale=1.0).flatten(0, 1),
    ),
    "heads apart from the mask on": (
        lambda m, q, k, v: (
            (bias(q).baddbmm(q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.5).view(2, 4, 5, -1) + m.mask)
            .softmax(-1)
            .view(8, 5, 5)
            @ v.flatten(0, 1)
        ).unflatten(0, (2, 4)),
        lambda q, k, v: sdpa(q, k, v, bias(q).unflatten(0, (2, 4)) + MASK, scale=0.5),
    ),
    "windows": (
        lambda m, q, k, v: ((q @ k.mT).view(1, 2, 4, 5, 5) + m.mask[:, :1]).view(-1, 4, 5, 5).softmax(-1) @ v,
        lambda q, k, v: sdpa(q, k, v, MASK, scale=1.0),
    ),
    "hidden by a tensor, and a mask": (
        lambda m, q, k, v: (torch.where(~m.hidden, q @ k.mT, torch.tensor(-1e38)) + m.mask).softmax(-1) @ v,
        lambda q, k, v: sdpa(q, k, v, MASK.masked_fill(HIDDEN, -1e38), scale=1.0),
    ),
    "divided after the mask": (
        lambda m, q, k, v: ((q @ k.mT + m.mask) / 4).softmax(-1) @ v,
        lambda q, k, v: sdpa(q, k, v, MASK / 4, scale=0.25),
    ),
    "scaled between a bias and a mask": (
        lambda m, q, k, v: ((q @ k.mT + m.mask[:1]) * 0.5 + m.mask).softmax(-1) @ v,
        lambda q, k, v: sdpa(q, k, v, MASK[:1] / 2 + MASK, scale=0.5),
    ),
    "a lower bound": (
        lambda m, q, k, v: torch.max(q @ k.mT + m.mask, torch.full((), -1e30)).softmax(-1) @ v,
        lambda q, k, v: sdpa(q, k, v, MASK, scale=1.0),
    ),
    "one head": (
        lambda m, q, k, v: ((q[:, 0] @ k[:, 0].mT) + m.mask[:, 0]).softmax(-1) @ v[:, 0],
        lambda q, k, v: sdpa(q[:, :1], k[:, :1], v[:, :1], MASK, scale=1.0)[:, 0],
    ),
    "a layer of dropout, in evaluation": (
        lambda self, q, k, v: self.drop((q @ k.mT).softmax(-1)) @ v,
        lambda q, k, v: sdpa(q, k, v, scale=1.0),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_has_the_bits_of_the_function(form: str) -> None:
    written, by_hand = FORMS[form]
    model, inputs = Plain(written).eval(), (heads(), heads(), heads())
    before = model(*inputs)
    apply_rules(model, fuse_attention(), example_inputs=inputs)
    assert torch.allclose(model(*inputs), by_hand(*inputs), atol=1e-7)  # a mask of floats for one of booleans
    assert torch.allclose(model(*inputs), before, atol=1e-6)
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(written(model, *leaves).square().sum(), leaves)
    for gradient, other in zip(torch.autograd.grad(model(*leaves).square().sum(), leaves), expected, strict=True):
        assert torch.allclose(gradient, other, atol=1e-5)
    remove(model)
    assert torch.equal(model(*inputs), before)


def repeated(x: Tensor, times: int = 2) -> Tensor:
    b, h, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h, times, s, d).reshape(b, h * times, s, d)


@pytest.mark.parametrize("repeat", [repeated, lambda x: x.repeat_interleave(2, dim=1)])
def test_repeated_heads(repeat: Callable[[Tensor], Tensor]) -> None:
    model = Plain(lambda _, q, k, v: (q @ repeat(k).transpose(2, 3)).softmax(-1) @ repeat(v))
    inputs = heads(), heads(2), heads(2)
    before = model(*inputs)
    apply_rules(model, fuse_attention(), example_inputs=inputs)
    assert torch.equal(model(*inputs), sdpa(*inputs, scale=1.0, enable_gqa=True))
    assert torch.allclose(model(*inputs), before, atol=1e-6)


@pytest.mark.parametrize("drop", [lambda self, x: self.drop(x), lambda self, x: F.dropout(x, 0.3, self.training)])
def test_dropout_in_training(drop: Callable[..., Tensor]) -> None:
    model = Plain(lambda self, q, k, v: drop(self, (q @ k.mT).softmax(-1)) @ v).train()
    inputs = heads(), heads(), heads()
    apply_rules(model, fuse_attention(), example_inputs=inputs)
    torch.manual_seed(0)
    output = model(*inputs)
    torch.manual_seed(0)
    assert torch.equal(output, sdpa(*inputs, dropout_p=0.3, scale=1.0))
    assert torch.allclose(model.eval()(*inputs), sdpa(*inputs, scale=1.0), atol=1e-7)


def softcapped(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT / 30) * 30).softmax(-1) @ v


REFUSED = {
    "a soft cap": softcapped,
    "another dimension": lambda _, q, k, v: (q @ k.mT).softmax(-2) @ v,
    "a dropout of the scores": lambda self, q, k, v: self.drop(q @ k.mT).softmax(-1) @ v,
    "scores hidden by a small number": lambda m, q, k, v: (q @ k.mT).masked_fill(m.hidden, -2.0).softmax(-1) @ v,
    "scores hidden by an unknown number": lambda m, q, k, v: torch.where(m.hidden, m.mask, q @ k.mT).softmax(-1) @ v,
    "queries and keys in other places": lambda _, q, k, v: (
        (q @ k.mT).view(2, 4, 1, 25).softmax(-1).view(2, 4, 5, 5) @ v
    ),
    "a mask that enlarges the scores": lambda m, q, k, v: (q[:1] @ k[:1].mT + m.mask).softmax(-1) @ v[:1],
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_the_function_does_not_compute_stays(form: str) -> None:
    model, inputs = Plain(REFUSED[form]).train(), (heads(), heads(), heads())
    with pytest.raises(PlanError):
        apply_rules(model, fuse_attention(), example_inputs=inputs)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("make", [bert, gpt2, llama, t5])
def test_models(make: Any, weights: bool) -> None:
    model, example = make()
    model.eval().set_attn_implementation("eager")
    before = model(**example)[0]
    apply_rules(model, fuse_attention(weights=weights), example_inputs=example)
    assert torch.allclose(model(**example)[0], before, atol=1e-5)
    attentions = [path for path, module in model.named_modules() if path.endswith(("self", "attn", "Attention"))]
    if not weights and make is llama:
        assert model.get_submodule(attentions[0])
    remove(model)
    assert torch.equal(model(**example)[0], before)


def test_scores_in_float32_of_values_in_half_precision() -> None:
    model = Plain(lambda m, q, k, v: (q.float() @ k.float().mT + m.mask).softmax(-1).to(v.dtype) @ v)
    inputs = heads().bfloat16(), heads().bfloat16(), heads().bfloat16()
    before = model(*inputs)
    apply_rules(model, fuse_attention(), example_inputs=inputs)
    q, k, v = (x.float() for x in inputs)
    assert torch.equal(model(*inputs), sdpa(q, k, v, MASK, scale=1.0).bfloat16())
    assert torch.allclose(model(*inputs), before, atol=2e-2)  # bfloat16 rounds the weights and the output


def test_the_reason_is_told() -> None:
    model, inputs = Plain(REFUSED["scores hidden by a small number"]), (heads(), heads(), heads())
    with pytest.raises(PlanError, match="the number for hidden scores is not known to be below -10000"):
        apply_rules(model, fuse_attention(), example_inputs=inputs)


def test_weights_that_the_forward_computes_with_are_kept() -> None:
    def forward(_: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights.amax(-1), weights

    model, inputs = Plain(forward), (heads(), heads(), heads())  # type: ignore[arg-type]
    before = model(*inputs)
    apply_rules(model, fuse_attention(weights=False), example_inputs=inputs)
    for value, other in zip(model(*inputs), before, strict=True):
        assert torch.allclose(value, other, atol=1e-6)
    remove(model)
    lone = Plain(lambda _, q, k, v: ((w := (q @ k.mT).softmax(-1)) @ v, w))  # type: ignore[arg-type, return-value]
    apply_rules(lone, fuse_attention(weights=False), example_inputs=inputs)
    output, none = lone(*inputs)
    assert none is None and torch.equal(output, sdpa(*inputs, scale=1.0))


def test_explain_tells_how_nearly_a_module_has_the_pattern() -> None:
    model = nn.Sequential(Plain(lambda _, q: (q @ q.mT).softmax(-1) @ q), Plain(lambda _, q: (q @ q.mT).tanh() @ q))
    found, missed = (explain(model, fuse_attention(), path, heads()) for path in ("0", "1"))
    assert found and "yes  pattern: found in 0" in str(found)
    assert not missed and "no   pattern: nearest miss" in str(missed)
    capped = nn.Sequential(Plain(lambda _, q: (q @ q.mT).tanh().softmax(-1) @ q), nn.Linear(8, 8))
    assert "the graph has tanh" in str(explain(capped, fuse_attention(), "", heads()))
    assert explain(capped, fuse_attention(), "0") and "not searched" in str(explain(capped, fuse_attention(), "0"))
    assert not explain(model, fuse_attention("0"), "1", heads())
