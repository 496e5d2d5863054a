"""LoRA on quantised Linears, against plain arithmetic on the dequantised weight, and the errors there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from surgery import (
    MergeError,
    PlanError,
    Rule,
    Site,
    SurgeryError,
    apply_rules,
    merge,
    plan_rules,
    remove,
    rule,
    unmerge,
)
from surgery.rules import (
    AdaLoraRule,
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
    TrainRule,
    VeraRule,
)
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

    model = convert(layer)
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

    model = convert(layer)
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


def convert(layer: Callable[[nn.Linear], nn.Module]) -> Any:
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
        params = model[index].adapters.default
        bias = model[index].bias
        y = F.linear(x, weight, bias if bias is None else bias.float()) + 1.5 * (x @ params.A.T) @ params.B.T
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
        params = model[0].adapters.default
        assert params.A.dtype == params.B.dtype == torch.float32
        torch.testing.assert_close(model[0](x), base + 1.5 * F.linear(F.linear(x, params.A), params.B))


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
    actual = model(x)
    assert actual.dtype == dtype and {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    expected = by_hand(model, weights, x.float())
    assert (actual.float() - expected).norm() < 2e-2 * expected.norm()  # two layers of half precision
    actual.float().sum().backward()
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
        assert all("merge_to(model, folder), and quantise" in str(problem.fix) for problem in caught.value.problems)
    assert before.differences(model) == [] and torch.equal(model(x), live)


@rule("test-scaled-weight")
class ScaledWeight(Rule):
    def rewrite(self, site: Site) -> None:
        site.replace(site.weight, site.weight * site.param("scale", (1,), 1.0))


@pytest.mark.parametrize(
    "weight_rule, says",
    [
        (TrainRule("0"), "its weight is packed, and codes have no gradient"),
    ],
    ids=["train"],
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
    assert "merge_to(model, folder), and quantise what that writes" in str(problem.fix)
    assert before.differences(model) == []


@every_kind
def test_a_rule_of_your_own_edits_the_dequantised_weight(build: Callable[..., Any], optional: Load) -> None:
    model, weights = build(optional)
    apply_rules(model, ScaledWeight("0"))
    with torch.no_grad():
        model[0].adapters.default.scale.fill_(3.0)
    x = torch.randn(8, SIZES[0])
    torch.testing.assert_close(model[0](x), F.linear(x, 3 * weights[0], model[0].bias), rtol=1e-5, atol=1e-5)


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


# Bases that change their form after rules came ---------------------------------------------------------------


T = ["0", "2"]
# Whether a rule computes with the weight itself, so it cannot use a packed weight.
AFTER: dict[str, tuple[Rule, bool]] = {
    "lora": (LORA, False),
    "lora_bias": (LoraRule(T, rank=4, lora_bias=True, init="random"), False),
    "dora": (LoraRule(T, rank=4, dora=True, init="random"), True),
    "ia3": (IA3Rule(T), False),
    "vera": (VeraRule(T, rank=4), False),
    "loha": (LohaRule(T, rank=4), False),
    "lokr": (LokrRule(T, rank=4), False),
    "oft": (OftRule(T, block_size=4), False),
    "boft": (BoftRule(T, block_size=4), True),
    "hra": (HraRule(T, rank=4), False),
    "miss": (MissRule(T, rank=4), False),
    "bat": (MissRule(T, rank=4, variant="bat"), True),
    "shira": (ShiraRule(T, rank=1), True),
    "fourier": (FourierRule(T, n_frequency=10), False),
    "c3a": (C3aRule(T, block_size=4), False),
    "road": (RoadRule(T, group_size=4), False),
    "randlora": (RandLoraRule(T, rank=4), False),
    "adalora": (AdaLoraRule(T, rank=4), False),
    "bias": (BiasRule("0"), False),
    "train": (TrainRule(T), False),
}


def build_trained(chosen: Rule) -> Any:
    torch.manual_seed(0)
    model = apply_rules(plain().eval(), chosen)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("name", AFTER)
def test_a_base_that_is_quantised_after_a_rule_came(name: str, optional: Load) -> None:
    quantization: Any = optional("torchao.quantization")
    chosen, reads = AFTER[name]
    model, x = build_trained(chosen), torch.randn(8, SIZES[0])
    live = model(x).detach()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    if reads:
        with pytest.raises(SurgeryError, match="can't compute with a quantised weight") as caught:
            model(x)
        assert caught.value.where == "0" and "Int8Tensor now: it was quantised after" in str(caught.value.why)
        assert "merge_to" in str(caught.value.fix) and caught.value.__cause__ is not None
    else:
        error = (model(x) - live).norm() / live.norm()
        assert error < 2e-2  # 8 bits a number, rows by rows
    quantised = model[0].weight
    remove(model)
    assert type(model[0]) is nn.Linear and model[0].weight is quantised


def test_what_changed_the_weight_at_its_start_cant_be_taken_out_of_a_quantised_one(optional: Load) -> None:
    quantization: Any = optional("torchao.quantization")
    model = apply_rules(plain(), LoraRule("0", rank=4, init="pissa"))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    before = Snapshot(model)
    for check in (True, False):
        with pytest.raises(MergeError, match="was quantised since a rule folded into it"):
            remove(model, check=check)
        assert not before.differences(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", AFTER)
def test_a_model_that_is_brought_to_another_precision_after_a_rule_came(name: str, dtype: torch.dtype) -> None:
    model, x = build_trained(AFTER[name][0]), torch.randn(8, SIZES[0])
    live = model(x).detach()
    actual = model.to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    # Weights, inputs and sums are rounded to the dtype, a few times on the way.
    slack = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert (actual.to(live.dtype) - live).norm() / live.norm() < slack
    actual.float().square().mean().backward()
    grads = [p.grad for key, p in model.named_parameters() if ".adapters." in key and p.requires_grad]
    assert grads and all(grad is not None for grad in grads)
    assert dtype is torch.float16 or all(bool(grad.isfinite().all()) for grad in grads)  # a large scale overflows


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("kind", ["weight_norm", "weight_norm hook", "spectral_norm", "prune"])
def test_a_weight_that_is_computed_anew_at_each_call_after_a_rule_came(kind: str) -> None:
    model, x = build_trained(LORA), torch.randn(8, SIZES[0])
    params, (_, down) = model[0].adapters.default, (model[0].weight.detach().clone(), model[2])
    utils = torch.nn.utils
    reparametrize: dict[str, Callable[[nn.Module], Any]] = {
        "weight_norm": utils.parametrizations.weight_norm,
        "weight_norm hook": utils.weight_norm,
        "spectral_norm": utils.parametrizations.spectral_norm,
        "prune": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    }
    reparametrize[kind](model[0])
    actual = model(x)
    hidden = torch.relu(F.linear(x, model[0].weight, model[0].bias) + 1.5 * x @ params.A.T @ params.B.T)
    torch.testing.assert_close(actual, down(hidden), rtol=1e-4, atol=1e-5)
    with pytest.raises(SurgeryError, match="remove"):  # names what takes it off
        merge(model)
    with pytest.raises(SurgeryError, match="remove"):
        remove(model)
    if kind.endswith("hook"):
        utils.remove_weight_norm(model[0])
    elif kind == "prune":
        prune.remove(model[0], "weight")
    else:
        utils.parametrize.remove_parametrizations(model[0], "weight")
    again = model(x)
    merge(model)
    torch.testing.assert_close(model(x), again, rtol=1e-4, atol=1e-5)
    assert type(remove(unmerge(model))[0]) is nn.Linear
