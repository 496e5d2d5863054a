"""`linear = True`: the change of the weight is derived from the rewrite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import LiveSite, MergeError, PlanError, Rule, Site, apply_rules, merge, remove, rule, unmerge
from surgery.rules import LoraRule
from tests.support.delta_methods import LAYERS, Holder


@rule("test-linear-lora")
class LinearLora(Rule):
    """LoRA without a `merged` of its own, with all that a rewrite may use."""

    dropout: float = 0.0
    linear = True

    def rewrite(self, site: Site) -> Tensor:
        A = site.param("A", (2, site.in_features), nn.init.normal_)
        B = site.param("B", (site.out_features, 2), nn.init.normal_)
        shift = site.buffer("turn", torch.tensor([1, 0]))
        x = F.dropout(site.inputs[next(iter(site.inputs))], self.dropout, site.training)  # type: ignore[arg-type]
        return site.output + site.apply(F.linear, x.to(A.dtype), A)[..., shift] @ B.t()


class OwnOperation(LinearLora):
    def rewrite(self, site: Site) -> Tensor:
        A = site.param("A", (2, site.in_features), nn.init.normal_)
        B = site.param("B", (site.out_features, 2), nn.init.normal_)
        return site.with_hidden(site.hidden + F.linear(site.call(site.input, weight=A, bias=None), B))


class Masked(LinearLora):
    """HiRA, W ∘ ΔW: linear in the input, but of the base's weight too."""

    additive = False  # type: ignore[assignment]

    def rewrite(self, site: Site) -> Tensor:
        A = site.param("A", (2, site.in_features), nn.init.normal_)
        B = site.param("B", (site.out_features, 2), nn.init.normal_)
        return site.output + F.linear(site.input, site.weight * (B @ A))


def derived_delta(rule: Rule, model: Any, x: Tensor) -> None:
    apply_rules(model, [rule])
    live = model.eval()(x)
    before = model.m.weight.detach().clone()
    merge(model)
    torch.testing.assert_close(model(x), live)
    assert not torch.equal(model.m.weight, before)
    remove(unmerge(model))
    assert torch.equal(model.m.weight, before)


@pytest.mark.parametrize("layer", LAYERS)
def test_delta_is_derived_from_a_linear_rewrite(layer: str) -> None:
    x = torch.randn(2, 3, 12 if layer == "wide" else 8)
    derived_delta(LinearLora("m", dropout=0.5), Holder(LAYERS[layer]()), x)


def test_delta_is_derived_through_the_modules_own_operation_and_its_weight() -> None:
    for kind in (OwnOperation, Masked):
        derived_delta(kind("m"), Holder(nn.Linear(12, 8)), torch.randn(3, 12))


def test_linear_rules_add_up() -> None:
    model, x = Holder(nn.Linear(12, 8)), torch.randn(3, 12)
    apply_rules(model, [LinearLora("m")], adapter="one")
    apply_rules(model, [LoraRule("m", init="random")], adapter="two")
    live = model(x)
    merge(model, "one")
    torch.testing.assert_close(merge_rest(model, x), live)


def merge_rest(model: Any, x: Tensor) -> Tensor:
    unmerge(model)
    merge(model)
    return model(x)


@rule("test-not-linear")
class NotLinear(Rule):
    how: str = "relu"
    linear = True

    def rewrite(self, site: Site) -> Tensor | None:
        g = site.param("g", (site.out_features, site.in_features), nn.init.normal_)
        y = F.linear(site.input, g)
        if self.how == "relu":
            return site.output + y.relu()
        if self.how == "bias":
            return site.output + y + site.param("b", (site.out_features,), 1.0)
        if self.how == "product":
            return site.output * 1.5 + y
        if self.how == "weight":
            return site.output + F.linear(site.input, site.weight * g)
        site.replace(site.output, site.output + y)
        return None


@pytest.mark.parametrize(
    "how, why",
    [
        ("relu", "and it is not"),
        ("bias", "and it is not"),
        ("product", "and it is not"),
        ("weight", "it reads the base's weight"),
        ("replace", "it replaces a value"),
    ],
)
def test_a_rule_that_is_not_linear_is_found_out(how: str, why: str) -> None:
    model: Any = Holder(nn.Linear(12, 8))
    before = model.m.weight.detach().clone()
    apply_rules(model, [NotLinear("m", how=how)])
    with pytest.raises(MergeError, match=why):
        merge(model)
    assert torch.equal(model.m.weight, before)
    assert remove(model).m.weight is not None


def test_delta_is_derived_on_linear_maps_alone() -> None:
    model = Holder(nn.Embedding(4, 4))

    @rule("test-shift")
    class Shift(Rule):
        linear = True

        def rewrite(self, site: Site) -> Tensor:
            return site.output + site.param("s", (4,), 1.0)

    apply_rules(model, [Shift("m")])
    with pytest.raises(MergeError, match="can't be derived on a Embedding"):
        merge(model)


def test_a_rule_without_a_closed_form_says_so() -> None:
    @rule("test-formless")
    class Formless(Rule):
        def rewrite(self, site: Site) -> Tensor:
            return site.output * 2

    model = apply_rules(Holder(nn.Linear(2, 2)), [Formless("m")])
    assert not Formless("m").mergeable and not Formless("m").additive
    with pytest.raises(PlanError, match="does not define merging"):
        merge(model)
    with pytest.raises(NotImplementedError):
        Formless("m").merged(LiveSite(nn.Linear(2, 2), "m", "default", {}, lambda *_: torch.zeros(())))


def test_attributes_of_attributes_are_recorded() -> None:
    @rule("test-real")
    class Real(Rule):
        def rewrite(self, site: Site) -> Tensor:
            return torch.fft.fft(site.output).real.T.mT.flatten(0)

    model, x = Holder(nn.Linear(3, 3)), torch.randn(2, 3)
    expected = torch.fft.fft(model(x)).real.flatten()
    apply_rules(model, [Real("m")])
    torch.testing.assert_close(model(x), expected)
