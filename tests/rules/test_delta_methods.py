"""AdaLoRA, FourierFT, SHiRA, C3A and RandLoRA: against PEFT with equal tensors, and tests that all five share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    Rule,
    RuleError,
    adapter_state_dict,
    apply_rules,
    merge,
    plan_rules,
    remove,
    rules_from_json,
    rules_to_json,
    unmerge,
)
from surgery.rules import AdaLoraRule, C3aRule, FourierRule, RandLoraRule, ShiraRule
from surgery.testing import assert_reversible
from tests.support.delta_methods import LAYERS, RULES, Holder, assert_close, disturb, foreign


def in_peft(model: nn.Module, name: str) -> Any:
    """PEFT's form of a copy of the model, with tensors as if trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft: Any = pytest.importorskip("peft")
    turned = {"fan_in_fan_out": not isinstance(model.m, nn.Linear)}
    configs: dict[str, Callable[[], Any]] = {
        "adalora": lambda: peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=10, target_modules=["m"], **turned),
        "fourier": lambda: peft.FourierFTConfig(n_frequency=10, scaling=20.0, target_modules=["m"], **turned),
        "shira": lambda: peft.ShiraConfig(r=2, random_seed=3, target_modules=["m"]),
        "c3a": lambda: peft.C3AConfig(block_size=4, target_modules=["m"]),
        "randlora": lambda: peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=["m"], **turned),
    }
    theirs = peft.get_peft_model(copy.deepcopy(model), configs[name]())
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return theirs


def tensors_of(layer: Any) -> dict[str, Tensor]:
    """A PEFT layer's tensors under our names."""
    names = {"A": "lora_A", "E": "lora_E", "B": "lora_B", "spectrum": "fourierft_spectrum", "values": "shira_weight"}
    names |= {"kernel": "c3a_kernel", "lambda_": "randlora_lambda", "gamma": "randlora_gamma"}
    result = {
        ours: getattr(layer, name)["default"] for ours, name in names.items() if len(getattr(layer, name, ())) > 0
    }
    if "lambda_" in result:
        result |= {"A": layer.randlora_A["default"], "B": layer.randlora_B["default"]}
    return result


def take_over(theirs: Any, ours: Any) -> dict[str, Tensor]:
    result = tensors_of(theirs.base_model.model.m)
    with torch.no_grad():
        for name, tensor in result.items():
            assert getattr(ours.m.adapters.default, name).shape == tensor.shape, name
            getattr(ours.m.adapters.default, name).copy_(tensor)
    return result


@foreign
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", RULES)
def test_given_the_same_tensors_a_layer_is_pefts(name: str, layer: str) -> None:
    if layer == "Conv1D" and name in ("shira", "c3a"):
        pytest.skip("PEFT has it on Linear alone")
    model: Any = Holder(LAYERS[layer]())
    theirs = in_peft(model, name)
    ours = apply_rules(model, [RULES[name]])
    tensors = take_over(theirs, ours)
    x = torch.randn(2, 3, 12 if layer == "wide" else 8)
    actual, expected = ours(x), theirs(x)
    assert (expected - theirs.base_model.model.m.base_layer(x)).abs().max() > 1e-3
    assert_close(actual, expected)
    weights = torch.randn_like(expected)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    for key, tensor in tensors.items():
        if tensor.requires_grad:
            assert tensor.grad is not None
            assert_close(ours.get_parameter(f"m.adapters.default.{key}").grad, tensor.grad, 3e-6)  # type: ignore[arg-type]
    theirs.eval().merge_adapter()
    before = ours.eval()(x)
    merge(ours)
    assert_close(ours.m.weight, theirs.base_model.model.m.base_layer.weight)
    assert_close(ours(x), before, 3e-6)
    remove(unmerge(ours))


@foreign
def test_the_same_places_as_in_peft() -> None:
    model: Any = Holder(nn.Linear(12, 8))
    fourier: Any = apply_rules(copy.deepcopy(model), [RULES["fourier"]])
    rows = in_peft(model, "fourier").base_model.model.m.indices["default"]
    assert torch.equal(fourier.m.adapters.default.index, rows[0] * 12 + rows[1])
    shira: Any = apply_rules(copy.deepcopy(model), [RULES["shira"]])
    rows = in_peft(model, "shira").base_model.model.m.shira_indices["default"].long()
    assert torch.equal(shira.m.adapters.default.index, rows[0] * 12 + rows[1])


@foreign
def test_defaults_are_pefts() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft: Any = pytest.importorskip("peft")
    pairs: list[tuple[Rule, Any, dict[str, str]]] = [
        (AdaLoraRule("m"), peft.AdaLoraConfig, {"rank": "init_r", "alpha": "lora_alpha", "dropout": "lora_dropout"}),
        (FourierRule("m"), peft.FourierFTConfig, {}),
        (ShiraRule("m"), peft.ShiraConfig, {"rank": "r"}),
        (C3aRule("m"), peft.C3AConfig, {"init": "init_weights"}),
        (
            RandLoraRule("m"),
            peft.RandLoraConfig,
            {"rank": "r", "alpha": "randlora_alpha", "dropout": "randlora_dropout"},
        ),
    ]
    for adapter_rule, config, names in pairs:
        inputs = {"total_step": 10} if config is peft.AdaLoraConfig else {}
        theirs = config(**inputs)
        for field in adapter_rule.to_dict():
            name = names.get(field, field)
            if hasattr(theirs, name) and field not in ("total_step", "targets", "exclude", "layers"):
                expected = None if getattr(theirs, name) == {} else getattr(theirs, name)  # no patterns
                assert getattr(adapter_rule, field) == expected, (adapter_rule, field)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", RULES)
def test_reversible(name: str, layer: str, dtype: torch.dtype) -> None:
    model: Any = Holder(LAYERS[layer]()).to(dtype).eval()
    x = torch.randn(2, 3, 12 if layer == "wide" else 8).to(dtype)
    assert_reversible(model, [RULES[name]], example_inputs=x)
    apply_rules(model, [RULES[name]])
    disturb(model)
    live = model(x)
    merge(model)
    slack = {torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(model(x), live, rtol=slack, atol=slack)


@pytest.mark.parametrize("name", RULES)
def test_written_read_exported_and_compiled(name: str) -> None:
    assert rules_from_json(rules_to_json([RULES[name]])) == [RULES[name]]
    model, x = Holder(nn.Linear(12, 8)).eval(), torch.randn(2, 12)
    apply_rules(model, [RULES[name]])
    disturb(model)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_a_start_that_changes_nothing() -> None:
    x = torch.randn(3, 12)
    for adapter_rule in (
        AdaLoraRule("m"),
        FourierRule("m", n_frequency=5, init="identity"),
        ShiraRule("m", rank=2),
        C3aRule("m", block_size=4, init="identity"),
        RandLoraRule("m"),
    ):
        assert adapter_rule.identity
        apply_rules(Holder(nn.Linear(12, 8)).eval(), [adapter_rule], example_inputs=x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaLoraRule("m", tinit=5, tfinal=5, total_step=10),
        lambda: AdaLoraRule("m", beta1=1.0),
        lambda: AdaLoraRule("m", orth_reg_weight=-1),
        lambda: FourierRule("m", scaling="large"),  # type: ignore[arg-type]
        lambda: C3aRule("m", block_size=0),
        lambda: RandLoraRule("m", sparse="yes"),  # type: ignore[arg-type]
        lambda: RandLoraRule("m", dropout=1.0),
    ],
)
def test_more_values_out_of_range(make: Callable[[], Rule]) -> None:
    with pytest.raises(RuleError):
        make()


def test_where_they_can_not_go() -> None:
    class Activated(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    for module, why in ((nn.Conv2d(4, 4, 1), "Linear and"), (Activated(12, 8), "not a plain linear map")):
        for adapter_rule in RULES.values():
            if isinstance(module, nn.Conv2d) and isinstance(adapter_rule, AdaLoraRule):
                continue  # which goes on Conv2d
            (problem,) = plan_rules(Holder(module), [adapter_rule]).problems
            assert why in str(problem)
    small = Holder(nn.Linear(3, 2))
    for adapter_rule, why in (
        (FourierRule("m"), "1000 entries are more than the 6"),
        (ShiraRule("m", rank=2), "10 entries are more than the 6"),
        (C3aRule("m", block_size=2), "do not divide its sizes, 2 and 3"),
    ):
        (problem,) = plan_rules(small, [adapter_rule]).problems
        assert why in str(problem)


def test_dropout_while_training() -> None:
    for adapter_rule in (AdaLoraRule("m", dropout=0.5), RandLoraRule("m", rank=2, dropout=0.5)):
        model, x = Holder(nn.Linear(12, 8)), torch.randn(3, 12)
        disturb(apply_rules(model, [adapter_rule]))
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))
        assert set(adapter_state_dict(model))
