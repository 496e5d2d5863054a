"""centre_layer_norm beside the LayerNorm in float64, and what keeps a LayerNorm in its place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import PlanError, RuleError, SiteError, apply_rules, commit, remove, rules_from_json, rules_to_json
from surgery.rules import LoraRule
from surgery.rules.rewrites import CentreNormRule, centre_layer_norm, fold_batch_norm, join_linears

D = 8


def norm(**settings: Any) -> nn.LayerNorm:
    made = nn.LayerNorm(D, **settings)
    if made.weight is not None:
        nn.init.normal_(made.weight)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", [{"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}], ids=str)
def test_a_linear_in_float64(bias: bool, settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(5, D, bias), norm(**settings), nn.GELU(), nn.Linear(D, 2)).double().eval()
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    linear: Any = model[0]
    old, before = dict(linear._parameters), model(x)
    (gradient,) = torch.autograd.grad(before.square().sum(), x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rule = centre_layer_norm(model, x)
    assert rule.norms == {"0": "1"} and rules_from_json(rules_to_json([rule])) == [rule]
    apply_rules(model, rule)
    centred: Any = model[1]
    assert type(centred) is nn.RMSNorm and centred.eps == settings.get("eps", 1e-5) and not centred.training
    assert (centred.weight is None) is ("elementwise_affine" in settings)
    assert all(value is None or value.mean(0).abs().max() < 1e-15 for value in linear._parameters.values())
    assert torch.allclose(model(x), before, rtol=1e-10, atol=1e-10)
    (again,) = torch.autograd.grad(model(x).square().sum(), x)
    assert torch.allclose(again, gradient, rtol=1e-10, atol=1e-10)
    remove(model)
    assert all(linear._parameters[name] is value for name, value in old.items()) and torch.equal(model(x), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_a_linear_in_float32_is_as_exact_as_its_sums(offset: float) -> None:
    """The bound is that of the sums in float32, carried through the norm. A mean of the features does not widen it."""
    model: Any = nn.Sequential(nn.Linear(64, D), norm(bias=False))
    with torch.no_grad():
        model[0].bias += offset
    x = torch.randn(100, 64)
    expected = copy.deepcopy(model).double()(x.double())
    apply_rules(model, centre_layer_norm(model, x))
    weight, bias, scale = (value.detach().double() for value in (model[0].weight, model[0].bias, model[1].weight))
    unit = torch.finfo(torch.float32).eps / 2
    root = (F.linear(x.double(), weight, bias).square().mean(-1, keepdim=True) + 1e-5).sqrt()
    # One rounding of each centred number, one of each product and sum; the bias is rounded before it is read.
    sums = F.linear(x.double().abs(), weight.abs(), bias.abs() + offset).amax(-1, keepdim=True)
    # y / rms(y): its error is at most (1 + |y| / rms) / rms of the error of y, and |y| / rms is at most √D.
    bound = unit * scale.abs() * (1 + D**0.5) * (66 * sums / root + D + 4)
    assert ((model(x).double() - expected).abs() <= bound).all()


def test_an_embedding() -> None:
    model: Any = nn.Sequential(nn.Embedding(11, D, padding_idx=2), norm(bias=False), nn.Linear(D, 3)).double()
    ids = torch.arange(11)[None]
    before = model(ids)
    apply_rules(model, centre_layer_norm(model, ids))
    assert type(model[1]) is nn.RMSNorm and model[0].weight.mean(1).abs().max() < 1e-15
    assert torch.equal(model[0].weight[2], torch.zeros(D).double())
    assert torch.allclose(model(ids), before, rtol=1e-10, atol=1e-10)
    commit(model)
    assert type(model) is nn.Sequential and torch.allclose(model(ids), before, rtol=1e-10, atol=1e-10)


def test_gradient_flags_and_modes_stay() -> None:
    model: Any = nn.Sequential(nn.Linear(5, D), norm(), nn.Linear(D, 2)).train()
    model[0].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    apply_rules(model, centre_layer_norm(model, torch.randn(2, 5)))
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad
    assert not model[1].weight.requires_grad and model[1].training


class Uses(nn.Module):
    """A Linear and a norm after it, and another use of the Linear."""

    def __init__(self, kind: str):
        super().__init__()
        self.linear, self.norm, self.kind = nn.Linear(D, D), norm(), kind

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        z = self.norm(y)
        if self.kind == "returned":
            return z, y
        if self.kind == "added":
            return z + y
        if self.kind == "called twice":
            return self.linear(z)
        return F.linear(z, self.linear.weight) if self.kind == "weight" else z


USES = {
    "returned": "the model returns the stream",
    "added": "the model returns the stream",
    "called twice": "linear is called 2 times",
    "weight": "linear_1 uses the weight of linear, too",
}


@pytest.mark.parametrize("kind", USES)
def test_a_linear_that_is_used_elsewhere_stays(kind: str) -> None:
    with pytest.raises(SiteError, match=USES[kind]):
        centre_layer_norm(Uses(kind), torch.randn(2, D))
    assert centre_layer_norm(Uses("once"), torch.randn(2, D)).norms == {"linear": "norm"}


def test_norms_that_stay() -> None:
    x, model = torch.randn(2, D, D), nn.Sequential(nn.Linear(D, D), norm())
    with torch.no_grad():
        model[1].bias[0] = 1  # type: ignore[index]
    with pytest.raises(SiteError, match="the bias of the LayerNorm is not zero"):
        centre_layer_norm(model, x)
    with pytest.raises(PlanError, match="the bias of the LayerNorm is not zero"):
        apply_rules(model, CentreNormRule(norms={"0": "1"}))
    assert type(model[1]) is nn.LayerNorm
    with pytest.raises(SiteError, match=r"the norm is over \(8, 8\), and the layer returns 8 features"):
        centre_layer_norm(nn.Sequential(nn.Linear(D, D), nn.LayerNorm([D, D])), x)
    with pytest.raises(SiteError, match="max_norm"):
        centre_layer_norm(nn.Sequential(nn.Embedding(5, D, max_norm=1.0), norm()), torch.tensor([1]))
    with pytest.raises(PlanError, match="a ReLU and a LayerNorm"):
        apply_rules(nn.Sequential(nn.ReLU(), norm()), CentreNormRule(norms={"0": "1"}))
    with pytest.raises(PlanError, match="not an ordinary tensor"):
        apply_rules(nn.Sequential(nn.Linear(D, D, device="meta"), norm()), CentreNormRule(norms={"0": "1"}))
    tied: Any = nn.Sequential(nn.Linear(D, D), norm(), nn.Linear(D, D))
    tied[2].weight = tied[0].weight
    with pytest.raises(PlanError, match="tensors of the two are shared: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight"):
        apply_rules(tied, CentreNormRule(norms={"0": "1"}))
    with pytest.raises(RuleError, match="centre_layer_norm finds them"):
        CentreNormRule("0")


def test_an_adapter_before_and_after() -> None:
    model, x = nn.Sequential(nn.Linear(D, D), norm()), torch.randn(2, D)
    apply_rules(model, LoraRule("0", rank=2), adapter="first")
    with pytest.raises(PlanError, match="not a plain Linear"):
        apply_rules(model, CentreNormRule(norms={"0": "1"}), adapter="second")
    remove(model)
    before = model(x)
    apply_rules(model, centre_layer_norm(model, x), adapter="first")
    apply_rules(model, LoraRule("0", rank=2), adapter="second")
    assert torch.allclose(model(x), before, atol=1e-5)
    remove(model)
    assert torch.equal(model(x), before)


def test_modules_with_hooks_stay() -> None:
    """In every rewrite that looks for pairs: another module in a module's place would not call its hooks."""
    linears = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    batch = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)).eval()
    layer = nn.Sequential(nn.Linear(D, D), norm())
    for model, find in ((linears, join_linears), (batch, fold_batch_norm), (layer, centre_layer_norm)):
        for module in model:
            hook = module.register_forward_hook(lambda module, args, output: None)
            with pytest.raises(SiteError, match="follow|0 has hooks|one of them has hooks"):
                find(model, torch.randn(2, D))
            hook.remove()
        find(model, torch.randn(2, D))
    layer[1].register_forward_hook(lambda module, args, output: None)
    with pytest.raises(PlanError, match="one of them has hooks"):
        apply_rules(layer, CentreNormRule(norms={"0": "1"}))
