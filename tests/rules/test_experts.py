"""LoRA on stacks of experts, against plain arithmetic (each expert's W + ΔW) and against PEFT's target_parameters."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import (
    LowRank,
    MergeError,
    PlanError,
    RuleError,
    SurgeryWarning,
    adapter_state_dict,
    apply_rules,
    base_state_dict,
    merge,
    plan_rules,
    remove,
    rules_from_json,
    rules_to_json,
    unmerge,
)
from surgery.arithmetic.exact_fold import fold, folded_value, unfold
from surgery.rules import CaptureRule, ExpertLoraRule, LoraRule, captured
from surgery.rules._linear.factored import Factored
from surgery.testing import Snapshot, assert_equivalent, assert_reversible

pytest.importorskip("transformers", reason="the experts are transformers'")

from tests.support.families import FAMILIES  # noqa: E402

MODELS = ("mixtral", "qwen3_moe", "gpt_oss")
OTHERS = (
    "qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3", "granitemoe", "granitemoeshared", "phimoe", "jetmoe",
    "glm4_moe", "ernie4_5_moe", "minimax", "jamba", "qwen3_next",
)  # fmt: skip
CODE = ("eager", "grouped_mm", "batched_mm")
RANK, ALPHA = 3, 6  # a rank that no kernel's alignment likes


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-OSS's tiny configuration is told, once, that its rotary factor is not the implied one."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")


def build(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    family = FAMILIES[name]
    model, inputs = family.make().eval(), family.inputs()
    with torch.no_grad():
        for parameter in model.parameters():  # wide enough apart that routing and experts matter
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, inputs


def add_expert_lora(model: Any, rule: ExpertLoraRule | None = None, adapter: str = "default") -> Any:
    apply_rules(model, [rule or ExpertLoraRule("experts", rank=RANK, alpha=ALPHA)], adapter=adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"adapters.{adapter}." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def expected_weights(model: nn.Module, scale: float = ALPHA / RANK) -> dict[str, Tensor]:
    """Every expert's W_e + scale · B_e A_e, one after the other, by name of the parameter."""
    adapters, result = dict(model.named_parameters()), {}
    for name in [name for name in adapters if name.endswith("_A")]:
        path, _, short = name.removesuffix("_A").partition(".adapters.default.")
        A, B, W = adapters[name], adapters[name.removesuffix("A") + "B"], adapters[f"{path}.{short}"]
        turned = model.get_submodule(path).is_transposed
        deltas = [scale * B[e] @ A[e] for e in range(len(A))]
        result[f"{path}.{short}"] = torch.stack(
            [W[e] + (delta.t() if turned else delta) for e, delta in enumerate(deltas)]
        )
    return result


def loss(logits: Tensor) -> Tensor:
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_gradients_are_those_of_changed_experts(
    name: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build(name)
    base = copy.deepcopy(model)
    add_expert_lora(model)
    model.set_experts_implementation(code)
    reference = torch.func.functional_call(base, expected_weights(model), (), inputs).logits
    trained = {key: params for key, params in model.named_parameters() if params.requires_grad}
    assert trained and all("_A" in key or "_B" in key for key in trained)
    gradients = torch.autograd.grad(loss(reference), list(trained.values()))
    monkeypatch.setattr(Factored, "dense", lambda self: pytest.fail("W + ΔW was made"))
    actual = model(**inputs).logits
    torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)
    assert (actual - base(**inputs).logits).abs().max() > 1e-2
    for got, expected in zip(torch.autograd.grad(loss(actual), list(trained.values())), gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("name", MODELS)
def test_exactly_reversible(name: str, code: str) -> None:
    model, inputs = build(name)
    model.set_experts_implementation(code)
    assert_reversible(model, ExpertLoraRule("experts", rank=2), example_inputs=inputs)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name: str) -> None:
    model, inputs = build(name)
    model.to(torch.bfloat16)
    before = Snapshot(model)
    plain = model(**inputs).logits
    add_expert_lora(model)
    params = model.model.layers[0].mlp.experts.adapters.default
    assert params.gate_up_proj_A.dtype == params.gate_up_proj_B.dtype == torch.float32
    live = model(**inputs).logits
    loss(live.float()).backward()
    assert params.down_proj_A.grad.dtype == torch.float32 and params.down_proj_A.grad.abs().sum() > 0
    with torch.no_grad():
        wide = copy.deepcopy(model).float()(**inputs).logits
    assert live.dtype == torch.bfloat16
    assert (live - wide).abs().max() < 0.1 * (wide - plain.float()).abs().max()
    merge(model)
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.dtype == torch.bfloat16
    unmerge(model)
    assert torch.equal(model(**inputs).logits, live)
    remove(model)
    assert not before.differences(model)


@pytest.mark.parametrize("name", MODELS)
def test_merged_is_every_experts_sum(name: str) -> None:
    model, inputs = build(name)
    add_expert_lora(model)
    expected, live = expected_weights(model), model(**inputs).logits
    merge(model)
    for path, tensor in expected.items():
        torch.testing.assert_close(model.get_parameter(path), tensor.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(base_state_dict(model)[path], tensor.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(**inputs).logits, live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_other_mixtures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build(name)
    before, plain = Snapshot(model), model(**inputs).logits
    stacks = sorted(
        {
            path
            for path, module in model.named_modules()
            if "Experts" in type(module).__name__ and any(params.dim() == 3 for params in module._parameters.values())
        }
    )
    monkeypatch.setattr(Factored, "dense", lambda self: pytest.fail("W + ΔW was made"))
    apply_rules(model, [ExpertLoraRule(stacks, rank=2, init="random")])
    live = model(**inputs).logits
    assert (live - plain).abs().max() > 1e-2
    merge(model)
    torch.testing.assert_close(model(**inputs).logits, live, rtol=1e-5, atol=1e-5)
    remove(unmerge(model))
    assert not before.differences(model)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("name", MODELS)
def test_given_the_same_tensors_it_is_pefts(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft: Any = pytest.importorskip("peft", reason="compares with PEFT")
    model, inputs = build(name)
    model.set_experts_implementation("eager")
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=names, init_lora_weights=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    ours = add_expert_lora(model)
    layers = [layer for _, layer in theirs.named_modules() if type(layer).__name__ == "ParamWrapper"]
    assert len(layers) == 4
    pairs = []
    for path in [path for path, module in ours.named_modules() if path.endswith(".experts")]:
        outer = theirs.get_submodule(f"base_model.model.{path}")
        for layer in (outer, outer.base_layer):
            A, B = (getattr(layer, f"lora_{factor}").default.weight for factor in "AB")
            params = ours.get_submodule(f"{path}.adapters.default").tensors()
            mine = params[f"{layer.parameter_name}_A"], params[f"{layer.parameter_name}_B"]
            with torch.no_grad():
                mine[0].copy_(A.view(mine[0].shape))
                assert torch.equal(mine[0].flatten(0, 1), A)
                mine[1].copy_(B.view(len(B), RANK, -1).permute(2, 0, 1))
                assert torch.equal(mine[1].permute(1, 2, 0).flatten(1), B)
            pairs.append((mine, (A, B)))
    actual, reference = ours(**inputs).logits, theirs(**inputs).logits
    torch.testing.assert_close(actual, reference, rtol=1e-5, atol=2e-6)
    loss(actual).backward()
    loss(reference).backward()
    for mine, (A, B) in pairs:
        torch.testing.assert_close(mine[0].grad.flatten(0, 1), A.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine[1].grad.permute(1, 2, 0).flatten(1), B.grad, rtol=1e-4, atol=1e-4)
    merge(ours)
    theirs.merge_adapter()
    for path in [path for path, module in ours.named_modules() if path.endswith(".experts")]:
        experts = theirs.get_submodule(f"base_model.model.{path}").get_base_layer()
        for short in ("gate_up_proj", "down_proj"):
            expected = getattr(experts, short)
            torch.testing.assert_close(ours.get_parameter(f"{path}.{short}"), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("name", MODELS)
def test_experts_without_a_token(name: str, code: str) -> None:
    model, _ = build(name)
    base = copy.deepcopy(model.model.layers[0].mlp.experts)
    add_expert_lora(model)
    model.set_experts_implementation(code)
    experts = model.model.layers[0].mlp.experts
    states, chosen = torch.randn(5, 32), torch.tensor([[0, 2]] * 4 + [[2, 0]])
    weights = torch.rand(5, 2)
    actual = experts(states, chosen, weights)
    expected = {key.rpartition(".")[2]: params for key, params in expected_weights(model).items() if ".0.mlp" in key}
    torch.testing.assert_close(actual, torch.func.functional_call(base, expected, (states, chosen, weights)))
    actual.sum().backward()
    for params in experts.adapters.default.parameters():
        assert params.grad[[0, 2]].abs().amax((1, 2)).min() > 0 and params.grad[[1, 3]].abs().max() == 0
    with torch.no_grad():
        for params in experts.adapters.default.parameters():
            params[[1, 3]] = float("nan")  # what is not asked for is not computed
    assert experts(states, chosen, weights).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str) -> None:
    model, inputs = build(name)
    add_expert_lora(model)
    ids = inputs["input_ids"][:1]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (model.generate(ids, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, uncached) and cached.shape[1] > ids.shape[1]
    merge(model)
    assert torch.equal(model.generate(ids, **settings), cached)


@pytest.mark.parametrize("code", ["grouped_mm", pytest.param("batched_mm", marks=pytest.mark.slow("as grouped_mm"))])
def test_compiles_as_one_graph(code: str) -> None:
    model, inputs = build("mixtral")
    add_expert_lora(model)
    model.set_experts_implementation(code)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual, reference = compiled(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(actual, reference)
    trained = [params for params in model.parameters() if params.requires_grad]
    for got, expected in zip(*(torch.autograd.grad(loss(out), trained) for out in (actual, reference)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_autocast_and_gradient_checkpointing() -> None:
    model, inputs = build("qwen3_moe")
    add_expert_lora(model)
    plain = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(**inputs).logits - plain).abs().max() < 0.05 * plain.abs().max()
    trained = [params for params in model.parameters() if params.requires_grad]
    reference = torch.autograd.grad(loss(plain), trained)
    model.train()
    model.activation_checkpointing_enable()
    loss(model(**inputs, use_cache=False).logits).backward()
    for params, expected in zip(trained, reference, strict=True):
        torch.testing.assert_close(params.grad, expected, rtol=1e-4, atol=1e-4)


def test_adapters_add_up_and_come_out_in_any_order() -> None:
    model, inputs = build("mixtral")
    before = Snapshot(model)
    plain = model(**inputs).logits
    add_expert_lora(model)
    first = model(**inputs).logits
    add_expert_lora(model, ExpertLoraRule("experts", parameters=["down_proj"], rank=2), adapter="second")
    assert (model(**inputs).logits - first).abs().max() > 1e-4
    both = model(**inputs).logits
    merge(model)
    torch.testing.assert_close(model(**inputs).logits, both, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert torch.equal(model(**inputs).logits, both)
    remove(model, "default")
    apply_rules(model, [LoraRule("all-linear", init="random")], adapter="third")
    remove(model)
    assert torch.equal(model(**inputs).logits, plain) and not before.differences(model)


def test_copies_and_names() -> None:
    model, inputs = build("gpt_oss")
    add_expert_lora(model)
    names = {key.rpartition(".")[2] for key in adapter_state_dict(model)}
    assert names == {"gate_up_proj_A", "gate_up_proj_B", "down_proj_A", "down_proj_B"}
    live = model(**inputs).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**inputs).logits, live)
    rule = ExpertLoraRule("experts", parameters=["down_proj"], rank_pattern={"down_proj": 4}, transposed=True)
    assert rules_from_json(rules_to_json([rule])) == [rule]


def test_the_start_changes_nothing_and_is_loras_for_each_expert() -> None:
    model, inputs = build("qwen3_moe")
    plain = model(**inputs).logits
    with pytest.warns(SurgeryWarning, match="largest useful rank"):  # many numbers, to see how they are drawn
        apply_rules(model, [ExpertLoraRule("experts", rank=64)], example_inputs=inputs)
    assert torch.equal(model(**inputs).logits, plain)
    A = model.model.layers[0].mlp.experts.adapters.default.gate_up_proj_A
    bound = 1 / A.shape[2] ** 0.5  # kaiming_uniform_(a=√5) of a matrix with `in` columns
    assert 0.95 * bound < A.abs().max() <= bound
    remove(model)
    with pytest.warns(SurgeryWarning, match="largest useful rank"):
        apply_rules(model, [ExpertLoraRule("experts", rank=64, init="gaussian")])
    A = model.model.layers[0].mlp.experts.adapters.default.gate_up_proj_A
    assert abs(float(A.detach().std()) * 64 - 1) < 0.1


def test_ranks_and_alphas_by_parameter() -> None:
    model, _ = build("mixtral")
    rule = ExpertLoraRule(
        "experts", rank_pattern={"experts.down_proj": 4}, alpha_pattern={r"layers\.0\..*": 16}, rslora=True
    )
    assert "down_proj_A[4, 4, 48]" in str(plan_rules(model, [rule]))
    apply_rules(model, [rule])
    params = model.model.layers[0].mlp.experts.adapters.default
    assert params.gate_up_proj_A.shape[1] == 8 and params.down_proj_A.shape[1] == 4
    with torch.no_grad():
        for _, tensor in model.named_parameters():
            if tensor.requires_grad:
                tensor.normal_()
    before = {index: model.model.layers[index].mlp.experts.down_proj.clone() for index in (0, 1)}
    merge(model)
    for index, alpha in ((0, 16), (1, 8)):
        experts = model.model.layers[index].mlp.experts
        A, B = experts.adapters.default.down_proj_A, experts.adapters.default.down_proj_B
        torch.testing.assert_close(experts.down_proj.detach(), before[index] + alpha / 2 * (B @ A).detach())


class Einsum(nn.Module):
    """Experts with an operation that `Factored` can't compute from the factors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        stack = torch.cat([self.weight[:2], self.weight[2:]])
        stack = stack + self.weight * 0.5 - self.weight.mean()
        return torch.einsum("eoi,bi->beo", stack, x) + torch.stack([expert.sum() for expert in self.weight]).sum()


class Batched(nn.Module):
    """As in Llama 4: tokens are sorted by expert, and a stack is (experts, in, out) without a flag that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.view(self.weight.shape[0], -1, self.weight.size(1)), self.weight)


@pytest.mark.parametrize("make, turned", [(Einsum, False), (Batched, True)])
def test_other_code(make: Callable[[], Any], turned: bool) -> None:
    model = nn.Sequential(make())
    plain = copy.deepcopy(model)

    def by_hand(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        delta = 4 * tensors["0.adapters.weight_B"] @ tensors["0.adapters.weight_A"]
        weight = plain.get_parameter("0.weight") + (delta.transpose(1, 2) if turned else delta)
        return torch.func.functional_call(plain, {"0.weight": weight}, (x,))

    rule = ExpertLoraRule("0", rank=2, transposed=turned)
    assert_equivalent(model, rule, by_hand, torch.randn(6, 4))
    assert_reversible(model, rule, example_inputs=torch.randn(6, 4))


def test_a_factored_matrix_is_its_sum() -> None:
    W, L, R, x = torch.randn(4, 16, 8), torch.randn(4, 16, 3), torch.randn(4, 3, 8), torch.randn(5, 8)
    value: Any = Factored(W, L, R, 0.5)
    dense = W + 0.5 * L @ R
    ids = torch.tensor([0, 1, 1, 2, 3])
    bias = torch.randn(16)
    for actual, expected in [
        (F.linear(x, value[1], bias), F.linear(x, dense[1], bias)),
        (x @ value[ids[1]].mT, x @ dense[1].t()),
        (x @ value[1].transpose(0, 1), x @ dense[1].t()),
        (value[1] @ x.t(), dense[1] @ x.t()),
        (torch.bmm(value[ids], x.unsqueeze(-1)), torch.bmm(dense[ids], x.unsqueeze(-1))),
        (torch.mm(value[2], x.t()), dense[2] @ x.t()),
        (value @ x.t(), dense @ x.t()),
        (value[:, 1], dense[:, 1]),
        (value.transpose(0, 1), dense.transpose(0, 1)),
        (torch.relu(value), dense.relu()),
        (torch.stack([value, value]), torch.stack([dense, dense])),
        (1 - value, 1 - dense),
        (value / 2 + W, dense / 2 + W),
        (W * value, W * dense),
    ]:
        torch.testing.assert_close(actual, expected)
    assert len(value) == 4 and value.shape == W.shape and value.dtype == W.dtype
    assert not isinstance(value, Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "turned", "spread"])
def test_a_stack_is_folded_and_unfolded_to_the_bit(layout: str, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 96, 64, dtype=dtype)
    if layout == "turned":
        weight = torch.randn(6, 64, 96, dtype=dtype).transpose(1, 2)
    if layout == "spread":
        weight = torch.randn(6, 100, 64, dtype=dtype)[:, :96]
    before = weight.clone()
    B, A = torch.randn(6, 96, 2) * 0.1, torch.randn(6, 2, 64) * 0.1
    change = LowRank(B.flatten(0, 1), A.flatten(0, 1), 0.5, groups=6)
    expected = torch.stack([before[e].double() + 0.5 * B[e].double() @ A[e].double() for e in range(6)])
    slack: Any = {"rtol": 1e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(folded_value(weight, change).double(), expected, **slack)
    record = fold(weight, change)
    assert record.kind == "record" and record.nbytes < before.nbytes
    torch.testing.assert_close(weight.double(), expected, **slack)
    unfold(weight, record)
    assert torch.equal(weight, before)
    copied = fold(weight, change, keep="copy")
    torch.testing.assert_close(weight.double(), expected, **slack)
    unfold(weight, copied)
    assert torch.equal(weight, before)


def test_a_stack_of_large_matrices_is_folded_in_pieces_of_one_expert() -> None:
    weight = torch.randn(2, 700, 800)  # each more than a tile
    before = weight.clone()
    B, A, gain = torch.randn(2, 700, 3), torch.randn(2, 3, 800), torch.rand(1400) + 0.5
    change = LowRank(B.flatten(0, 1), A.flatten(0, 1), torch.tensor([1.0, 2, 3, 4, 5, 6]), groups=2, gain=gain)
    record = fold(weight, change)
    scales = torch.tensor([[[1.0, 2, 3]], [[4.0, 5, 6]]])
    torch.testing.assert_close(weight, gain.view(2, 700, 1) * (before + (B * scales) @ A), rtol=1e-4, atol=1e-5)
    unfold(weight, record)
    assert torch.equal(weight, before)


def test_factors_that_fit_no_stack() -> None:
    weight = torch.randn(6, 8, 4)
    with pytest.raises(MergeError, match="can't take"):
        fold(weight, LowRank(torch.randn(40, 2), torch.randn(12, 4), groups=6))


def test_what_is_refused() -> None:
    model, _ = build("mixtral")
    with pytest.raises(PlanError, match="no parameter of three dimensions"):
        apply_rules(model, [ExpertLoraRule("q_proj")])
    with pytest.raises(PlanError, match="owns no parameter 'up_proj'; it has gate_up_proj, down_proj"):
        apply_rules(model, [ExpertLoraRule("experts", parameters=["up_proj"])])
    with pytest.raises(PlanError, match="there is ExpertLoraRule"):
        apply_rules(model, [LoraRule("experts")])
    with pytest.raises(PlanError, match="rank_pattern has 'up'"):
        apply_rules(model, [ExpertLoraRule("experts", parameters=["down_proj"], rank_pattern={"up": 2})])
    gpt_oss, _ = build("gpt_oss")
    with pytest.raises(PlanError, match="a stack of experts is"):
        apply_rules(gpt_oss, [ExpertLoraRule("experts", parameters=["down_proj_bias"])])
    packed = nn.Sequential(Batched())
    packed[0].weight = nn.Parameter(torch.zeros(3, 4, 5).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(PlanError, match="which is packed"):
        apply_rules(packed, [ExpertLoraRule("0")])


@pytest.mark.parametrize(
    "field, value",
    [("rank", 0), ("alpha", 0), ("parameters", "up"), ("init", "pissa"), ("transposed", 2), ("dtype", "int8")],
)  # fmt: skip
def test_values_out_of_range(field: str, value: Any) -> None:
    inputs: dict[str, Any] = {field: value}
    with pytest.raises(RuleError, match=field):
        ExpertLoraRule("experts", **inputs)


@pytest.mark.parametrize("code", CODE)
def test_code_behind_a_wrapper_may_call_its_arguments_otherwise(code: str) -> None:
    """GPT-OSS's forward says `router_indices=None`; the implementation that it hands on to says `top_k_index`."""
    model, inputs = build("gpt_oss")
    model.set_experts_implementation(code)
    plain = model(**inputs).logits
    apply_rules(model, [CaptureRule("experts")])
    with captured(model) as actual:
        assert torch.equal(model(**inputs).logits, plain)
    assert set(actual) == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}


def by_other_names(function: Any) -> Any:
    """As transformers selects an implementation of experts: the called function has other argument names."""

    @functools.wraps(function)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = {"own": function}.get("other", _scaled)
        return chosen(self, *args, **kwargs)

    return forward


def _scaled(module: Any, x: Tensor, factor: Tensor) -> Tensor:
    return module.lin(x) * factor


def with_options(function: Any) -> Any:
    """As transformers' decorators, which read options from the keyword arguments."""

    @functools.wraps(function)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs) * (2 if kwargs.get("double") else 1)

    return forward


class ByOtherNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    @by_other_names
    def forward(self, states: Tensor, weights: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class WithOptions(ByOtherNames):
    @with_options
    def forward(self, states: Tensor, weights: Tensor | None = None, double: bool = False) -> Tensor:  # type: ignore[override]
        return self.lin(states)


def test_arguments_reach_what_is_behind_a_wrapper() -> None:
    x, factor = torch.randn(2, 3), torch.randn(3)
    for module, args, named in [(ByOtherNames(), (x, factor), {}), (WithOptions(), (x,), {"double": True})]:
        plain = module(*args, **named)
        apply_rules(module, [CaptureRule(type(module))])
        assert torch.equal(module(*args, **named), plain)
