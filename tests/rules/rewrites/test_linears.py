"""join_linears beside products of matrices, and QuantiseRule beside rounding by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from surgery import (
    PlanError,
    RuleError,
    SiteError,
    apply_rules,
    merge,
    packed_weight_of,
    remove,
    rules_from_json,
    rules_to_json,
    unmerge,
)
from surgery.rules import LoraRule
from surgery.rules.rewrites import Int8Linear, JoinLinearsRule, QuantiseRule, join_linears


def test_three_in_a_row() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3), nn.ReLU())
    x = torch.randn(5, 4)
    before = model(x)
    rule = join_linears(model, x)
    assert rule.linears == {"0": "1", "1": "2"} and rules_from_json(rules_to_json([rule])) == [rule]
    first, second, third = (model[i].weight.double() for i in range(3))
    bias = third @ second @ model[0].bias.double() + model[2].bias.double()
    apply_rules(model, rule)
    assert torch.allclose(model(x), F.linear(x, (third @ second @ first).float(), bias.float()).relu(), atol=1e-6)
    assert torch.allclose(model(x), before, atol=1e-5) and model[2].weight.shape == (3, 4)
    remove(model)
    assert torch.equal(model(x), before)


def test_a_low_rank_pair_stays_unless_asked() -> None:
    model, x = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8)), torch.randn(5, 8)
    with pytest.raises(SiteError, match="no Linear follows"):
        join_linears(model, x)
    before = model(x)
    apply_rules(model, join_linears(model, x, larger=True))
    assert torch.allclose(model(x), before, atol=1e-6)


def test_bad_pairs() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(6, 3))
    with pytest.raises(PlanError, match="returns 8 features, and the second takes 6"):
        apply_rules(model, JoinLinearsRule(linears={"0": "1"}))
    with pytest.raises(RuleError, match="join_linears finds them"):
        JoinLinearsRule("0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8(dtype: torch.dtype) -> None:
    model: Any = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4, bias=False)).to(dtype)
    x = torch.randn(3, 16, dtype=dtype)
    before, weight, bias = model(x), model[0].weight.detach().clone(), model[0].bias
    apply_rules(model, QuantiseRule("0"))
    scale = weight.float().abs().amax(1) / 127
    codes = torch.clamp(torch.round(weight.float() / scale[:, None]), -127, 127)
    assert isinstance(model[0], Int8Linear) and torch.equal(model[0].weight, codes.to(torch.int8))
    assert torch.equal(model[0](x), F.linear(x, codes.to(dtype)) * scale.to(dtype) + bias)
    assert ((codes * scale[:, None] - weight.float()).abs() <= scale[:, None] * 0.5001).all()
    remove(model)
    assert torch.equal(model(x), before)


def test_int8_refuses_other_modules_and_shared_weights() -> None:
    tied: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(PlanError, match="its weight is also 1.weight"):
        apply_rules(tied, QuantiseRule("0"))
    with pytest.raises(PlanError, match="it is a ReLU"):
        apply_rules(nn.Sequential(nn.ReLU()), QuantiseRule(nn.ReLU))


def test_adapters_beside_an_int8_linear() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 8)
    before = model(x)
    apply_rules(model, QuantiseRule("0"), adapter="int8")
    quantised = model(x)
    apply_rules(model, LoraRule("2", rank=2, init="random"), adapter="lora")
    model(x).sum().backward()
    remove(model, "lora")
    assert torch.equal(model(x), quantised)
    remove(model)
    assert torch.equal(model(x), before)


def test_adapters_go_on_linears_of_int8() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)), torch.randn(5, 16)
    apply_rules(model, QuantiseRule(nn.Linear), adapter="int8")
    quantised: Any = model[0]
    packed = packed_weight_of(quantised)
    assert packed is not None and torch.equal(packed.dequantise(), quantised.weight.float() * quantised.scale[:, None])
    again = packed.requantise(packed.dequantise())
    assert torch.equal(again["weight"], quantised.weight)
    apply_rules(model, LoraRule("all-linear", rank=2, init="random"), adapter="lora")
    params = quantised.adapters.lora
    weight = packed.dequantise() + 4 * params.B @ params.A
    torch.testing.assert_close(quantised(x), F.linear(x, weight, quantised.bias), rtol=1e-4, atol=1e-5)
    live = model(x)
    merge(model, "lora", quantised="dequantise")
    torch.testing.assert_close(model(x), live, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(model(x), live)
