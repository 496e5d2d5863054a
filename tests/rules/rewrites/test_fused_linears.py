"""fuse_linears beside the product with weights that are concatenated by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import PlanError, RuleError, SurgeryWarning, adapter_state_dict, apply_rules, remove
from surgery.rules import LoraRule
from surgery.rules.rewrites import fuse_linears
from tests.support.tiny import bert, llama


class Attention(nn.Module):
    """Its keys have no bias, and its values another size."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)


def by_hand(model: Attention, x: Tensor) -> Tensor:
    weight = torch.cat([model.q.weight, model.k.weight, model.v.weight])
    bias = torch.cat([model.q.bias, torch.zeros(8), model.v.bias])
    q, k, v = F.linear(x, weight, bias).split([8, 8, 6], -1)
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("held", [False, True])
def test_bits_of_the_product_by_hand(held: bool) -> None:
    model, x = Attention(), torch.randn(2, 5, 8)
    before = model(x)
    apply_rules(model, fuse_linears(held=held), example_inputs=x)
    assert torch.equal(model(x), by_hand(model, x))
    assert torch.allclose(model(x), before, atol=1e-6)  # one BLAS call sums in another order than three
    assert len(adapter_state_dict(model)) == (2 if held else 0)
    if not held:
        weights = [model.q.weight, model.k.weight, model.v.weight, model.v.bias]
        for gradient, expected in zip(torch.autograd.grad(model(x).sum(), weights),
                                      torch.autograd.grad(by_hand(model, x).sum(), weights), strict=True):  # fmt: skip
            assert torch.equal(gradient, expected)
    with torch.no_grad():
        model.q.weight.mul_(2)
    assert torch.equal(model(x), by_hand(model, x)) is not held  # the adapter's copy does not follow
    remove(model)
    assert type(model) is Attention


class Mixed(nn.Module):
    """The second pair has another input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(y))


def test_other_inputs_stay() -> None:
    x = torch.randn(3, 8)
    with pytest.raises(PlanError):
        apply_rules(Mixed(), fuse_linears(count=2), example_inputs=(x, torch.randn(3, 8)))
    with pytest.raises(RuleError, match="fuses 2 or 3"):
        fuse_linears(count=4)


@pytest.mark.parametrize("make, targets", [(llama, ["self_attn", "mlp"]), (bert, ["self"])])
def test_models(make: Any, targets: list[str]) -> None:
    model, example = make()
    before = model.eval()(**example)[0]
    rules = [fuse_linears(targets[0]), *(fuse_linears(target, count=2) for target in targets[1:])]
    apply_rules(model, rules, example_inputs=example)
    assert torch.allclose(model(**example)[0], before, atol=1e-5)
    remove(model)
    assert torch.equal(model(**example)[0], before)


def test_a_linear_with_an_adapter_stays() -> None:
    model, x = Attention(), torch.randn(2, 5, 8)
    apply_rules(model, LoraRule("k", rank=2, init="random"), adapter="lora")
    with pytest.raises(PlanError):
        apply_rules(model, fuse_linears(), example_inputs=x, adapter="fused")
    assert type(model) is Attention


class InPlace(nn.Module):
    """Longformer and others write in place to the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        q /= 2
        return q @ k.mT


def test_a_part_may_be_written_in_place() -> None:
    model, x = InPlace(), torch.randn(3, 8)
    before = model(x)
    apply_rules(model, fuse_linears(count=2), example_inputs=x)
    assert torch.allclose(model(x), before, atol=1e-6)
    model(x).sum().backward()


class Cross(nn.Module):
    """Attends to the states of an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.key, self.value = Attention(), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return (self.attention(x) @ self.key(memory).mT).softmax(-1) @ self.value(memory)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Cross(), Cross()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return torch.cat([self.first(x, memory), self.second(x, memory)], -1)


def test_linears_of_several_layers_with_one_input_stay_apart() -> None:
    model, example = Decoder(), (torch.randn(2, 5, 8), torch.randn(2, 3, 8))
    before = model(*example)
    sites = {path for path, module in apply_rules(model, fuse_linears(), example_inputs=example).named_modules()
             if hasattr(type(module), "_surgery_base")}  # fmt: skip
    assert sites == {"first.attention", "second.attention"}
    assert torch.allclose(model(*example), before, atol=1e-6)  # one BLAS call sums in another order than three
    remove(model)
    apply_rules(model, fuse_linears(across_modules=True), example_inputs=example)
    assert hasattr(type(model), "_surgery_base") and torch.allclose(model(*example), before, atol=1e-6)


def test_a_site_that_cannot_be_traced_is_left_out_with_the_reason() -> None:
    """T5's cache changes while the layers run, so their operations can't be a part of the decoder's forward."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 9, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2}
    config = transformers.T5Config(**sizes, num_layers=1, num_decoder_layers=2)
    model, ids = transformers.T5Model(config).eval(), torch.tensor([[1, 2, 3]])
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    with pytest.warns(SurgeryWarning, match=r"leaves out decoder with the operations of 6 sites"):
        apply_rules(model, fuse_linears(across_modules=True), example_inputs=inputs)
    assert hasattr(type(model.encoder.block[0].layer[0].SelfAttention), "_surgery_base")
    assert type(model.decoder) is type(model.encoder)
