"""Complex modules: adapters are complex, as in PEFT, and merging is exact. Methods for real numbers refuse them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import (
    LoadError,
    MergeError,
    PlanError,
    Rule,
    SiteError,
    SurgeryError,
    activate,
    apply_rules,
    combine,
    copy_adapter,
    load_adapter,
    merge,
    remove,
    route,
    rule,
    save_adapter,
    unmerge,
)
from surgery.rules import (
    AdaLoraRule,
    BottleneckRule,
    C3aRule,
    FourierRule,
    HraRule,
    IA3Rule,
    LohaRule,
    LoraRule,
    OftRule,
    RandLoraRule,
    ReftRule,
    ShiraRule,
    SteerRule,
    TokensRule,
    TrainRule,
    VeraRule,
)
from surgery.testing import Snapshot
from tests.support.methods import METHODS, Holder, in_peft, needs_peft, take_over, theirs_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature"),
    pytest.mark.filterwarnings("error:Casting complex values to real"),
]
DTYPES = [torch.complex64, torch.complex128]
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(16, 12), (3, 16)),
    "Conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), (2, 8, 9)),
    "Conv2d": (lambda: nn.Conv2d(8, 12, 3), (2, 8, 7, 7)),
    "Conv2d-1x1": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 7, 7)),
    "Conv2d-groups": (lambda: nn.Conv2d(8, 12, 3, groups=2), (2, 8, 7, 7)),
}


def example(layer: str, dtype: torch.dtype) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    module = make().to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return Holder(module), torch.randn(shape, dtype=dtype)


def disturb(model: Any, by: float = 0.2) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters." in name:
                parameter.add_(torch.randn_like(parameter) * by)


def assert_merged_is_live(model: Any, x: Tensor, slack: float) -> None:
    before, live = Snapshot(model), model(x)
    merge(model)
    torch.testing.assert_close(model(x), live, rtol=slack, atol=slack)
    unmerge(model)
    assert torch.equal(model(x), live) and before.differences(model) == []


SLACK = {torch.complex64: 1e-5, torch.complex128: 1e-12}  # a few roundings of sums of up to 72 products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("fields", [{}, {"dora": True}, {"lora_bias": True}, {"rslora": True}], ids=str)
def test_lora_is_its_formula(layer: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    model, x = example(layer, dtype)
    base, before = copy.deepcopy(model), Snapshot(model)
    apply_rules(model, [LoraRule("m", rank=4, alpha=6, **fields)])
    params = model.m.adapters.default
    assert {tensor.dtype for tensor in params.parameters()} == {dtype}
    assert not params.A.imag.any() and params.A.real.any()  # PEFT's start
    assert torch.equal(model(x), base(x)) or fields.get("dora")
    disturb(model)
    W = base.m.weight.detach()
    parts = params.A.shape[0] // params.B.shape[1]
    A, B = params.A.flatten(1).chunk(parts), params.B.flatten(1).chunk(parts)
    scale = 6 / (2 if fields.get("rslora") else 4)
    changed = W + scale * torch.cat([b @ a for b, a in zip(B, A, strict=True)]).view(W.shape)
    if fields.get("dora"):
        norm = changed.flatten(1).abs().square().sum(1).sqrt()
        changed = changed * (params.magnitude.flatten() / norm).view(-1, *(1,) * (W.dim() - 1))
    bias = base.m.bias + (scale * params.B_bias if fields.get("lora_bias") else 0)
    expected = torch.func.functional_call(base, {"m.weight": changed, "m.bias": bias}, (x,))
    torch.testing.assert_close(model(x), expected, rtol=SLACK[dtype], atol=SLACK[dtype])
    assert_merged_is_live(model, x, SLACK[dtype])
    remove(model)
    assert before.differences(model) == []


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, layer",
    [(n, layer) for n, m in METHODS.items() for layer in m.in_peft if layer in LAYERS and n not in ("coft", "hra-gs")],
)
def test_given_the_same_tensors_a_method_is_pefts(name: str, layer: str) -> None:
    model, x = example(layer, torch.complex64)
    method = METHODS[name]
    theirs, ours = in_peft(model, method), apply_rules(model, [method.rule])
    tensors = theirs_of(theirs.base_model.model.m, method)
    with torch.no_grad():
        for tensor in tensors.values():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    mine: Any = ours.get_submodule("m.adapters.default")
    assert all(mine.tensors()[key].dtype == torch.complex64 for key in tensors)
    take_over(tensors, mine.tensors())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)  # PEFT sums in another order
    assert_merged_is_live(ours, x, 1e-5)


@pytest.mark.parametrize(
    "adapter_rule",
    [AdaLoraRule("m", rank=4, total_step=9), ShiraRule("m", rank=2), RandLoraRule("m", rank=3), TrainRule("m")],
)
def test_other_methods_are_complex_and_merge(adapter_rule: Rule) -> None:
    model, x = example("Linear", torch.complex64)
    apply_rules(model, [adapter_rule])
    disturb(model)
    assert any(tensor.is_complex() and tensor.imag.any() for tensor in model.m.adapters.default.parameters())
    assert_merged_is_live(model, x, 1e-5)


def test_gradients_are_those_of_the_formula() -> None:
    model, x = example("Linear", torch.complex128)
    apply_rules(model, [LoraRule("m", rank=2, init="random")])
    params, W, b = model.m.adapters.default, model.m.weight, model.m.bias
    A, B = (tensor.detach().clone().requires_grad_() for tensor in (params.A, params.B))
    model(x).abs().square().sum().backward()
    F.linear(x, W + 4 * B @ A, b).abs().square().sum().backward()
    torch.testing.assert_close(params.A.grad, A.grad)
    torch.testing.assert_close(params.B.grad, B.grad)


REFUSED: list[tuple[Rule, str]] = [
    (LoraRule("m", dropout=0.1), "no dropout for complex numbers; give it a rule with dropout=0"),
    (LoraRule("m", dtype="float32"), "would drop the imaginary part"),
    (LoraRule("m", init="pissa"), "init='pissa' works on real numbers"),
    (LoraRule("m", init="olora"), "init='olora' works on real numbers"),
    (LoraRule("m", init="orthogonal"), "init='orthogonal' works on real numbers"),
    (LohaRule("m", rank_dropout=0.1), "give it a rule with rank_dropout=0"),
    (VeraRule("m", dropout=0.1), "give it a rule with dropout=0"),
    (OftRule("m", block_size=4, coft=True), "bounds the size of real numbers"),
    (HraRule("m", rank=2, apply_GS=True), "Gram-Schmidt turns real vectors"),
    (FourierRule("m", n_frequency=9), "the real part of a Fourier transform"),
    (C3aRule("m", block_size=4), "the real part of a Fourier transform"),
    (BottleneckRule("m"), "its activation is one of real numbers"),
    (ReftRule("m"), "its rotation is one of real numbers"),
]


@pytest.mark.parametrize("adapter_rule, why", REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_of_real_numbers_is_refused_by_name(adapter_rule: Rule, why: str) -> None:
    model, _ = example("Linear", torch.complex64)
    before = Snapshot(model)
    with pytest.raises(PlanError, match=r"its parameters are complex64|the weight is complex") as caught:
        apply_rules(model, [adapter_rule])
    assert why in str(caught.value) and before.differences(model) == []


@pytest.mark.parametrize("adapter_rule", [LoraRule("m"), TokensRule("m", tokens=[1]), TrainRule("m")])
def test_an_embedding_has_no_gradients_in_torch(adapter_rule: Rule) -> None:
    with pytest.raises(PlanError, match="torch has no gradients for an Embedding of complex numbers"):
        apply_rules(Holder(nn.Embedding(9, 4).to(torch.complex64)), [adapter_rule])


def test_several_adapters_weights_files_and_rows(tmp_path: Path) -> None:
    model, x = example("Linear", torch.complex64)
    base = copy.deepcopy(model)
    for name in ("red", "blue"):
        apply_rules(model, [LoraRule("m", rank=2, init="random")], adapter=name)
    disturb(model)
    deltas = {n: 4 * getattr(model.m.adapters, n).B @ getattr(model.m.adapters, n).A for n in ("red", "blue")}
    activate(model, ["red", "blue"], {"red": 0.5, "blue": -2.0})
    expected = F.linear(x, base.m.weight + 0.5 * deltas["red"] - 2.0 * deltas["blue"], base.m.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert_merged_is_live(model, x, 1e-5)
    combine(model, {"red": 0.5, "blue": -2.0}, into="both", method="cat")
    copy_adapter(model, "red", "again")
    activate(model, "both")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    with route(model, ["red", None, "blue"]):
        rows = model(x)
    torch.testing.assert_close(
        rows[0], F.linear(x[0], base.m.weight + deltas["red"], base.m.bias), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(rows[1], base(x[1:2])[0])
    activate(model, "red")
    other = copy.deepcopy(base)
    save_adapter(model, tmp_path / "red", adapter="red")
    load_adapter(other, tmp_path / "red")
    assert torch.equal(other(x), model(x))
    with pytest.raises(LoadError, match="holds complex64, and float32 is needed"):
        load_adapter(Holder(nn.Linear(16, 12)), tmp_path / "red")
    apply_rules(other.to(torch.complex128), [LoraRule("m")], adapter="wide")
    with pytest.raises(SurgeryError, match="safetensors has no torch.complex128"):
        save_adapter(other, tmp_path / "wide", adapter="wide")


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True])
def test_files_of_peft_both_ways(tmp_path: Path, dora: bool) -> None:
    import peft

    model, x = example("Linear", torch.complex64)
    base = copy.deepcopy(model)
    apply_rules(model, [LoraRule("m", rank=2, init="random", dora=dora)])
    disturb(model)
    save_adapter(model, tmp_path / "ours")
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(x), model(x))


@rule("test-steered-linear")
class LinearRule(Rule):
    linear = True

    def rewrite(self, site: Any) -> Tensor:
        return site.output + F.linear(site.input, site.param("delta", (site.out_features, site.in_features)))


def test_a_rule_that_is_linear_derives_a_complex_delta() -> None:
    model, x = example("Linear", torch.complex64)
    apply_rules(model, [LinearRule("m")])
    disturb(model)
    assert_merged_is_live(model, x, 1e-5)


def test_a_direction_is_added_to_complex_features() -> None:
    model, x = example("Linear", torch.complex64)
    expected = model(x) + 2.0
    apply_rules(model, [SteerRule("m", direction=[2.0] * 12)])
    torch.testing.assert_close(model(x), expected)


def test_complex_factors_do_not_go_into_a_real_weight() -> None:
    @rule("test-complex-factors")
    class Complex(Rule):
        def rewrite(self, site: Any) -> Tensor:
            A = site.param("A", (2, site.in_features), dtype="complex64")
            return site.output + F.linear(site.input.to(A.dtype), A).abs().sum()

        def merged(self, site: Any) -> Any:
            from surgery import LowRank

            A = site.params["A"].detach()
            return {"weight": LowRank(A.new_ones(len(site.weight), 2), A)}

    model = Holder(nn.Linear(16, 12))
    apply_rules(model, [Complex("m")])
    with pytest.raises(MergeError, match="its factors are complex, but the weight is real"):
        merge(model)


def test_ia3_in_half_precision_stays_as_it_was() -> None:
    model = Holder(nn.Linear(4, 4).to(torch.bfloat16))
    apply_rules(model, [IA3Rule("m")])
    assert model.get_parameter("m.adapters.default.scale").dtype == torch.float32


class Mixed(nn.Module):
    """Its first parameters are real, and its hidden state is complex."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.complex = nn.Linear(4, 4), nn.Linear(4, 4).to(torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.complex(self.real(x).to(torch.complex64))


@pytest.mark.parametrize("adapter_rule", [BottleneckRule(Mixed, features=4), ReftRule(Mixed, rank=2, features=4)])
def test_a_complex_hidden_state_is_not_cast_to_real_numbers(adapter_rule: Rule) -> None:
    model = apply_rules(Mixed(), [adapter_rule])
    with pytest.raises(SiteError, match="its imaginary part would be dropped"):
        model(torch.ones(2, 4))
    remove(model)
    apply_rules(model, [SteerRule(Mixed, direction=[1.0] * 4)])
    assert model(torch.ones(2, 4)).dtype == torch.complex64
