"""LoRA on quantised Linears: plain arithmetic on the dequantised weight; what can't be done there says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rules import BiasRule, LoraRule, TrainRule
from surgery import PlanError, Rule, Site, apply_rules, merge, plan_rules, remove, rule
from surgery.testing import Snapshot

Load = Callable[[str], ModuleType]
SIZES = (64, 64, 32)  # on some CPUs 4-bit kernels want multiples of 32


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(SIZES[0], SIZES[1]), nn.ReLU(), nn.Linear(SIZES[1], SIZES[2], bias=False))


def int8(optional: Load) -> tuple[nn.Module, list[Tensor]]:
    """bitsandbytes' LLM.int8: rows of the weight, and of the input, are rounded to 8 bits."""
    bnb: Any = optional("bitsandbytes")

    def layer(old: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=old.bias is not None, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        return new.to("cpu")  # quantises

    model = converted(layer)
    weights = [linear.weight.CB.float() * linear.weight.SCB[:, None] / 127 for linear in (model[0], model[2])]
    return model, weights


def nf4(optional: Load, quant_type: str = "nf4", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Tensor]]:
    bnb: Any = optional("bitsandbytes")

    def layer(old: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=dtype, quant_type=quant_type
        )
        new.load_state_dict(old.state_dict())
        return new.to("cpu")

    model = converted(layer)
    dequantise = optional("bitsandbytes.functional").dequantize_4bit
    weights = [dequantise(linear.weight.data, linear.weight.quant_state) for linear in (model[0], model[2])]
    return model, [weight.float().reshape(shape) for weight, shape in zip(weights, shapes(), strict=True)]


def fp4(optional: Load) -> tuple[nn.Module, list[Tensor]]:
    return nf4(optional, "fp4")


def torchao(optional: Load) -> tuple[nn.Module, list[Tensor]]:
    quantization: Any = optional("torchao.quantization")
    model = plain()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model, [model[index].weight.dequantize().detach().clone() for index in (0, 2)]  # type: ignore[operator, union-attr]


def converted(layer: Callable[[nn.Linear], nn.Module]) -> Any:
    model = plain()
    for index in (0, 2):
        model[index] = layer(model[index])  # type: ignore[arg-type]
    return model


def shapes() -> list[tuple[int, int]]:
    return [(SIZES[1], SIZES[0]), (SIZES[2], SIZES[1])]


# What a base's own kernel may be off from float32 arithmetic on its dequantised weight: int8 rounds inputs, too.
KINDS: dict[Callable[..., tuple[nn.Module, list[Tensor]]], float] = {int8: 3e-2, nf4: 1e-5, fp4: 1e-5, torchao: 1e-5}
every_kind = pytest.mark.parametrize("build", KINDS, ids=lambda build: build.__name__)

LORA = LoraRule(["0", "2"], rank=4, alpha=6, init="random")


def by_hand(model: Any, weights: list[Tensor], x: Tensor) -> Tensor:
    for index, weight in zip((0, 2), weights, strict=True):
        held = model[index].adapters.default
        bias = model[index].bias
        y = F.linear(x, weight, bias if bias is None else bias.float()) + 1.5 * (x @ held.A.T) @ held.B.T
        x = torch.relu(y) if index == 0 else y
    return x


@every_kind
def test_forward_and_gradients_are_plain_arithmetic(build: Callable[..., Any], optional: Load) -> None:
    model, weights = build(optional)
    slack = KINDS[build]
    apply_rules(model, [LORA])
    results = []
    for forward in (model, lambda x: by_hand(model, weights, x)):
        torch.manual_seed(1)
        x = torch.randn(8, SIZES[0], requires_grad=True)
        model.zero_grad()
        y = forward(x)
        (y * torch.linspace(-1, 1, SIZES[2])).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if ".adapters." in name}
        assert len(grads) == 4 and all(grad is not None for grad in grads.values())
        results.append({"output": y.detach(), "input": x.grad, **grads})
    for name, expected in results[1].items():
        # Relative to the tensor's own size: a ReLU near zero may open in one run and not in the other.
        error = (results[0][name] - expected).norm() / expected.norm()
        assert error <= slack, (name, float(error))
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapters." not in name)


@every_kind
def test_the_branch_is_added_to_the_kernels_own_output(build: Callable[..., Any], optional: Load) -> None:
    model, _ = build(optional)
    x = torch.randn(8, SIZES[0])
    with torch.no_grad():  # on some CPUs another kernel where gradients are asked for, which rounds otherwise
        base = model.eval()[0](x)
        apply_rules(model, [LORA], example_inputs=x)
        held = model[0].adapters.default
        assert held.A.dtype == held.B.dtype == torch.float32
        torch.testing.assert_close(model[0](x), base + 1.5 * F.linear(F.linear(x, held.A), held.B))


@every_kind
def test_in_and_out_to_the_bit(build: Callable[..., Any], optional: Load) -> None:
    model, _ = build(optional)
    x = torch.randn(8, SIZES[0])
    with torch.no_grad():  # bitsandbytes rounds otherwise in training, and on some CPUs where gradients are asked for
        base = model.eval()(x)
    before = Snapshot(model)
    state = copy.deepcopy(model.state_dict())
    plan = plan_rules(model, [LoraRule(["0", "2"], rank=4)], example_inputs=x)
    assert [step["kind"] for step in plan.to_dict()["steps"]] == ["opaque", "opaque"]
    assert plan.added == 4 * (SIZES[0] + 2 * SIZES[1] + SIZES[2])
    apply_rules(model, [LoraRule(["0", "2"], rank=4, dropout=0.1)], example_inputs=x)
    with torch.no_grad():
        assert torch.equal(model(x), base)
    remove(model)
    assert before.differences(model) == []
    assert list(model.state_dict()) == list(state)
    with torch.no_grad():
        assert torch.equal(model(x), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_kernels_keep_their_dtype(dtype: torch.dtype, optional: Load) -> None:
    model, weights = nf4(optional, dtype=dtype)
    apply_rules(model, [LORA])
    x = torch.randn(8, SIZES[0], dtype=dtype)
    found = model(x)
    assert found.dtype == dtype and {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    expected = by_hand(model, weights, x.float())
    assert (found.float() - expected).norm() < 2e-2 * expected.norm()  # two layers of half precision
    found.float().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".adapters." in name)


@every_kind
def test_merging_is_refused_with_the_reason(build: Callable[..., Any], optional: Load) -> None:
    model, _ = build(optional)
    x = torch.randn(8, SIZES[0])
    apply_rules(model, [LORA])
    live = model(x)
    before = Snapshot(model)
    every_way: list[dict[str, Any]] = [{}, {"safe": True}, {"keep": "copy"}, {"untie": True}]
    for settings in every_way:
        with pytest.raises(PlanError) as caught:
            merge(model, **settings)
        assert [problem.where for problem in caught.value.problems] == ["0", "2"]
        assert all("quantised" in str(problem.why) and problem.fix for problem in caught.value.problems)
    assert before.differences(model) == [] and torch.equal(model(x), live)


@rule("test-scaled-weight")
class ScaledWeight(Rule):
    def rewrite(self, site: Site) -> None:
        site.replace(site.weight, site.weight * site.param("scale", (1,), 1.0))


@pytest.mark.parametrize(
    "weight_rule, says",
    [
        (LoraRule("0", rank=4, dora=True), "DoRA needs the weight's norm, and the weight is packed"),
        (LoraRule("0", rank=4, init="pissa"), "changes the weight, and the weight is packed"),
        (LoraRule("0", rank=4, init="olora"), "changes the weight, and the weight is packed"),
        (TrainRule("0"), "edits the weight of a"),
        (ScaledWeight("0"), "edits the weight of a"),
    ],
    ids=["dora", "pissa", "olora", "train", "custom"],
)
@every_kind
def test_rules_on_the_weight_are_refused_with_the_reason(
    build: Callable[..., Any], weight_rule: Rule, says: str, optional: Load
) -> None:
    model, _ = build(optional)
    before = Snapshot(model)
    with pytest.raises(PlanError) as caught:
        apply_rules(model, [weight_rule])
    (problem,) = caught.value.problems
    assert problem.where == "0" and says in str(problem) and problem.why
    assert before.differences(model) == []


@every_kind
def test_the_bias_is_an_ordinary_parameter(build: Callable[..., Any], optional: Load) -> None:
    model, _ = build(optional)
    x = torch.randn(8, SIZES[0])
    with torch.no_grad():  # on some CPUs another kernel where gradients are asked for
        base = model.eval()[0](x)
        apply_rules(model, [BiasRule("0")], example_inputs=x)
        assert torch.equal(model[0](x), base)
        model[0].adapters.default.bias += 1
        torch.testing.assert_close(model[0](x), base + 1)
    model[0](x).sum().backward()
    assert model[0].adapters.default.bias.grad is not None
