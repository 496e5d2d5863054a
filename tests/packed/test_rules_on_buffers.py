"""Rules on modules whose weight lies in packed buffers: no parameter `weight`, and sizes under other names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from surgery import (
    PlanError,
    Rule,
    apply_rules,
    load_adapter,
    packed_weight_of,
    plan_rules,
    remove,
    route,
    save_adapter,
)
from surgery.rules import (
    BiasRule,
    BoftRule,
    C3aRule,
    FourierRule,
    HraRule,
    IA3Rule,
    LohaRule,
    LokrRule,
    LoraRule,
    MissRule,
    OftRule,
    RandLoraRule,
    RoadRule,
    ShiraRule,
    VeraRule,
)
from surgery.testing import Snapshot
from tests.support.packed_layers import HQQLinear, QuantLinear, TorchLinear, WQLinear_GEMM

LAYERS: dict[str, Callable[[nn.Linear], Any]] = {
    "gptq v1": lambda linear: QuantLinear(linear),
    "gptq v2": lambda linear: TorchLinear(linear, bits=3),
    "awq": lambda linear: WQLinear_GEMM(linear),
    "hqq": lambda linear: HQQLinear(linear),
}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
LORA = LoraRule("all-linear", rank=4, alpha=6, init="random")


def build(layer: Callable[[nn.Linear], Any]) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(layer(nn.Linear(64, 48)), nn.ReLU(), layer(nn.Linear(48, 32, bias=False)))


def by_hand(model: Any, x: torch.Tensor) -> torch.Tensor:
    for index in (0, 2):
        module, params = model[index], model[index].adapters.default
        weight = module.reference().to(x.dtype)
        bias = module.bias if module.bias is None else module.bias.to(x.dtype)
        y = F.linear(x, weight, bias) + 1.5 * F.linear(F.linear(x.float(), params.A), params.B).to(x.dtype)
        x = torch.relu(y) if index == 0 else y
    return x


@every_layer
def test_lora_is_plain_arithmetic_on_the_dequantised_weight(layer: Any) -> None:
    model = apply_rules(build(layer), LORA)
    params = model[0].adapters.default
    assert params.A.shape == (4, 64) and params.B.shape == (48, 4) and params.A.dtype == torch.float32
    results = []
    for forward in (model, lambda x: by_hand(model, x)):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model.zero_grad()
        y = forward(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) == 2 + 4
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_their_dtype(layer: Any, dtype: torch.dtype) -> None:
    model = apply_rules(build(layer), LORA)
    x = torch.randn(5, 64).to(dtype)
    actual = model(x)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, by_hand(model, x), rtol=3e-2, atol=3e-2)


@every_layer
def test_in_and_out_to_the_bit(layer: Any) -> None:
    model, x = build(layer), torch.randn(5, 64)
    base, before = model(x), Snapshot(model)
    plan = plan_rules(model, LoraRule("all-linear", rank=4), example_inputs=x)
    assert plan.added == 4 * (64 + 48 + 48 + 32)
    apply_rules(model, LoraRule("all-linear", rank=4), example_inputs=x)
    assert torch.equal(model(x), base)
    remove(model)
    assert before.differences(model) == [] and torch.equal(model(x), base)


RULES: dict[str, Rule] = {
    "lora_bias": LoraRule("all-linear", rank=4, lora_bias=True),
    "rank above the group": LoraRule("all-linear", rank=32),
    "ia3": IA3Rule("all-linear"),
    "vera": VeraRule("all-linear", rank=4),
    "loha": LohaRule("all-linear", rank=4),
    "lokr": LokrRule("all-linear", rank=4),
    "oft": OftRule("all-linear", block_size=4),
    "hra": HraRule("all-linear", rank=4),
    "miss": MissRule("all-linear", rank=4),
    "fourier": FourierRule("all-linear", n_frequency=10),
    "c3a": C3aRule("all-linear", block_size=16),
    "road": RoadRule("all-linear", group_size=4),
    "randlora": RandLoraRule("all-linear", rank=4),
    "dora": LoraRule("all-linear", rank=4, dora=True, init="random"),
    "boft": BoftRule("all-linear", block_size=4),
    "shira": ShiraRule("all-linear", rank=1),
    "bat": MissRule("all-linear", rank=4, variant="bat"),
}


@pytest.mark.parametrize("layer", ["gptq v1", "hqq"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_computes_as_on_a_linear_with_the_dequantised_weight(rule: Rule, layer: str) -> None:
    packed, plain = build(LAYERS[layer]), build(lambda linear: linear)
    with torch.no_grad():
        for index in (0, 2):
            plain[index].weight.copy_(packed[index].reference())
            if packed[index].bias is not None:
                plain[index].bias.copy_(packed[index].bias)
    for model in (packed, plain):
        torch.manual_seed(2)
        apply_rules(model, rule)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".adapters." in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    x = torch.randn(5, 64)
    # These edit the weight, and round the new one to float16 as the old one is.
    slack = 1e-3 if isinstance(rule, (BoftRule, ShiraRule, MissRule)) else 1e-4
    torch.testing.assert_close(packed(x), plain(x), rtol=slack, atol=slack)


def test_the_bias_is_not_a_parameter_and_the_message_names_one_that_trains() -> None:
    with pytest.raises(PlanError, match=r"its bias is not a parameter; LoraRule\(lora_bias=True\) trains one"):
        apply_rules(build(LAYERS["gptq v1"]), BiasRule("0"))


def test_targets_by_type_name_and_the_largest_useful_rank() -> None:
    model = build(LAYERS["gptq v1"])
    with pytest.warns(UserWarning, match="rank 100 is more than the weights"):
        apply_rules(model, LoraRule(QuantLinear, rank=100))
    assert model[2].adapters.default.A.shape == (100, 48)


@every_layer
def test_adapters_are_saved_loaded_and_routed(layer: Any, tmp_path: Path) -> None:
    model, x = build(layer), torch.randn(4, 64)
    apply_rules(model, LORA, adapter="a")
    save_adapter(model, tmp_path / "a", adapter="a")
    expected = model(x)
    remove(model)
    base = model(x)
    load_adapter(model, tmp_path / "a", adapter="a")
    assert torch.equal(model(x), expected)
    model.eval()
    with route(model, ["a", None, "a", None]):
        mixed = model(x)
    torch.testing.assert_close(mixed, torch.stack([expected[0], base[1], expected[2], base[3]]))


@every_layer
def test_copies_with_adapters_compute_the_same(layer: Any) -> None:
    model, x = apply_rules(build(layer), LORA), torch.randn(4, 64)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_sizes_on_the_meta_device() -> None:
    model = build(LAYERS["gptq v2"]).to("meta")
    assert plan_rules(model, LoraRule("all-linear", rank=4)).added == 4 * (64 + 48 + 48 + 32)
    apply_rules(model, LORA)
    assert model[0].adapters.default.A.is_meta


class LouderLinear(QuantLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class NamedLinear(QuantLinear):
    pass


def test_a_subclass_with_another_forward_is_refused() -> None:
    assert packed_weight_of(NamedLinear(nn.Linear(64, 32))) is not None
    apply_rules(nn.Sequential(NamedLinear(nn.Linear(64, 32))), LORA)
    with pytest.raises(
        PlanError, match="its forward does more than its base class's, and its weight is in packed buffers"
    ):
        apply_rules(nn.Sequential(LouderLinear(nn.Linear(64, 32))), LORA)
