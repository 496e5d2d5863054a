"""Merging: errors, the record of a merge, and the detection of a base that changed while merged."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    MergeError,
    MergeReport,
    PlanError,
    Rule,
    SurgeryError,
    SurgeryWarning,
    activate,
    adapters,
    apply_rules,
    deactivate,
    merge,
    remove,
    rule,
    unmerge,
)
from surgery.rules import IA3Rule, LoraRule, TokensRule, TrainRule
from surgery.testing import Snapshot, assert_equivalent, assert_reversible


def make_adapted(inner: int, out: int, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inner, out)).to(dtype)
    apply_rules(model, [LoraRule("0", rank=8, init="random", **fields)])
    with torch.no_grad():
        for parameter in model[0].adapters.parameters():  # type: ignore[union-attr, operator]
            parameter *= 0.2
    return model


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_a_tied_weight_is_refused_by_name_and_untied_on_request() -> None:
    torch.manual_seed(0)
    model = Tied()
    ids, shared = torch.arange(10), model.embed.weight
    apply_rules(model, [LoraRule("head", rank=2, init="random")])
    live = model(ids)
    with pytest.raises(SurgeryError, match="embed.weight and head.weight"):
        merge(model)
    assert torch.equal(model(ids), live)
    merge(model, untie=True)
    torch.testing.assert_close(model(ids), live)
    assert model.embed.weight is shared and model.head.weight is not shared
    unmerge(model)
    assert model.head.weight is shared and torch.equal(model(ids), live)


def test_training_the_base_while_merged_is_found_before_anything_is_touched() -> None:
    model = make_adapted(16, 12)
    merge(model)
    with torch.no_grad():
        model[0].weight[3, 4] += 1e-3
    before = Snapshot(model)
    with pytest.raises(MergeError, match="changed") as error_info:
        unmerge(model)
    assert error_info.value.where == "0" and not before.differences(model)
    with torch.no_grad():
        model[0].weight[3, 4] -= 1e-3
    unmerge(model, check=False)
    remove(model)


def test_loading_other_weights_while_merged_is_found() -> None:
    model = make_adapted(16, 12)
    merge(model)
    model[0].load_state_dict(nn.Linear(16, 12).state_dict(), strict=False)
    with pytest.raises(MergeError, match="changed"):
        unmerge(model)


def test_merging_twice_applying_and_removing_while_merged() -> None:
    model = make_adapted(16, 12)
    merge(model)
    for act in (lambda: remove(model), lambda: apply_rules(model, [TrainRule("0")], adapter="b")):
        before = Snapshot(model)
        with pytest.raises(SurgeryError, match="merged"):
            act()
        assert not before.differences(model)
    report, before = merge_again(model), Snapshot(model)
    assert report.sites == 1 and report.nbytes and not before.differences(model)
    unmerge(model)
    before = Snapshot(model)
    with pytest.warns(SurgeryWarning, match="nothing is merged"):
        unmerge(model)
    assert not before.differences(model)


def merge_again(model: nn.Module) -> MergeReport:
    """Merging a merged adapter is a warning, as in PEFT, not an error."""
    with pytest.warns(SurgeryWarning, match="merged already"):
        return merge(model)


def test_merging_others_while_merged_is_an_error() -> None:
    model = apply_rules(make_adapted(16, 12), LoraRule("0", rank=2), adapter="b")
    merge(model, "b")
    for names in ("default", ["default", "b"]):
        with pytest.raises(SurgeryError, match="merged already"):
            merge(model, names)


@pytest.mark.parametrize("dtype, value", [(torch.float32, float("nan")), (torch.float16, 1e5)])
def test_safe_refuses_what_is_not_finite(dtype: torch.dtype, value: float) -> None:
    model = make_adapted(16, 12, dtype=dtype)
    with torch.no_grad():
        model[0].adapters.default.B[0, 0] = value
        model[0].adapters.default.A.fill_(1e3 if dtype == torch.float16 else 1.0)
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match="not finite"):
        merge(model, safe=True)
    assert not before.differences(model)
    merge(model)
    unmerge(model)
    assert not before.differences(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_record_is_small(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(1024, 1024)).to(dtype)
    with torch.no_grad():
        model[0].weight.normal_(std=1024**-0.5)
    apply_rules(model, [LoraRule("0", rank=8, init="random")])
    adapter = model[0].adapters.default
    with torch.no_grad():
        adapter.B.mul_(0.03 * model[0].weight.float().norm() / (adapter.B @ adapter.A).norm())
    report = merge(model)
    factors = 4 * 8 * 2048
    assert (report.nbytes - factors) / report.entries <= 0.15 and "bytes an entry" in str(report)
    unmerge(model)
    assert merge(model, keep="copy").nbytes == model[0].weight.numel() * model[0].weight.element_size()


def test_exact_after_other_threads_training_and_pickling(tmp_path: Path) -> None:
    model = make_adapted(96, 64)
    before = model[0].weight.detach().clone()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        merge(model)
        torch.set_num_threads(1)
        with torch.no_grad():
            model[0].adapters.default.A.normal_()
        other = pickle.loads(pickle.dumps(model))
        assert torch.equal(unmerge(other)[0].weight, before)
        assert torch.equal(unmerge(copy.deepcopy(model))[0].weight, before)
        assert torch.equal(unmerge(model)[0].weight, before)
    finally:
        torch.set_num_threads(threads)


def test_a_converted_model_is_found_out() -> None:
    model = make_adapted(16, 12)
    merge(model)
    model.half()
    with pytest.raises(MergeError, match="changed"):
        unmerge(model)


def test_adapters_of_which_one_hides_the_other_are_not_merged_together() -> None:
    model = apply_rules(nn.Sequential(nn.Embedding(9, 4)), [TokensRule("0", tokens=[1, 2])], adapter="a")
    deactivate(model)
    apply_rules(model, [TokensRule("0", tokens=[2, 3])], adapter="b")
    before = Snapshot(model)
    with pytest.raises(PlanError, match="can't be merged together.*\n.*\n.*both have rows for 2"):
        merge(model, ["a", "b"])
    assert not before.differences(model)
    merge(model, "b")


def test_a_rule_without_a_closed_form_is_refused_with_its_reason() -> None:
    @rule("test-shift-input")
    class Shift(Rule):
        why_not_merged = "it acts on the input"

        def rewrite(self, site: Any) -> None:
            site.replace(site.input, site.input + site.param("shift", (site.in_features,), init=1.0))

    model = apply_rules(nn.Sequential(nn.Linear(4, 3)), [Shift("0")])
    with pytest.raises(PlanError, match="it acts on the input"):
        merge(model)
    x = torch.randn(2, 4)
    plain = remove(copy.deepcopy(model))
    assert torch.equal(model(x), plain(x + 1.0))


def test_part_of_a_stack() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 6))
    for name in ("a", "b"):
        apply_rules(model, [LoraRule("0", rank=2, init="random")], adapter=name)
    x = torch.randn(3, 8)
    live = model(x)
    merge(model, "b")
    torch.testing.assert_close(model(x), live)
    assert type(model[0]) is not nn.Linear
    unmerge(model)
    assert torch.equal(model(x), live)
    apply_rules(model, [LoraRule("0", rank=2, dora=True)], adapter="c")
    with pytest.raises(SurgeryError, match="depends on the order"):
        merge(model, "a")


@pytest.mark.parametrize("order", list(itertools.permutations(["turn", "flip", "lora"])), ids="-".join)
def test_a_changed_input_is_changed_for_every_rule_of_its_site(order: tuple[str, ...]) -> None:
    @rule("test-turn-input")
    class Turn(Rule):
        def rewrite(self, site: Any) -> None:
            site.replace(site.input, site.input @ site.param("turn", (site.in_features, site.in_features)))

        def merged(self, site: Any) -> dict[str, Tensor]:
            return {"weight": site.weight @ site.params["turn"].t()}

    rules_by_name = {"turn": Turn("0"), "flip": Turn("0"), "lora": LoraRule("0", rank=2, init="random")}
    model: Any = nn.Sequential(nn.Linear(5, 4))
    for name in order:
        apply_rules(model, [rules_by_name[name]], adapter=name)
    with torch.no_grad():
        model[0].adapters.turn.turn.normal_()
        model[0].adapters.flip.turn.normal_()
    x = torch.randn(3, 5)
    live = model(x)
    merge(model)
    torch.testing.assert_close(model(x), live, rtol=1e-4, atol=1e-4)


def test_several_adapters_are_one_rounding() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 48, bias=False)).to(torch.bfloat16)
    weight = model[0].weight.detach().clone()
    for name in ("a", "b", "c"):
        apply_rules(model, [LoraRule("0", rank=4, init="random")], adapter=name)
    adapter_modules = [model[0].adapters.a, model[0].adapters.b, model[0].adapters.c]
    delta = sum(
        (part.B.double() @ part.A.double() * 2 for part in adapter_modules), torch.zeros(48, 64, dtype=torch.float64)
    )
    merge(model)
    assert torch.equal(model[0].weight, (weight.float() + delta.float()).to(torch.bfloat16))


def test_public_assertions_find_what_is_wrong() -> None:
    assert_reversible(nn.Sequential(nn.Linear(4, 4)), LoraRule("0", rank=2), example_inputs=torch.randn(2, 4))

    @rule("test-wrong-merge")
    class Wrong(Rule):
        def rewrite(self, site: Any) -> Tensor:
            return site.output + site.param("shift", (site.out_features,))

        def merged(self, site: Any) -> dict[str, Tensor]:
            return {"bias": site.bias + 2 * site.params["shift"]}

    layer = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    with pytest.raises(AssertionError):
        assert_equivalent(layer, Wrong(nn.Linear), lambda t, x: layer(x) + t["adapters.shift"], x)

    @rule("test-sticky")
    class Sticky(Rule):
        def rewrite(self, site: Any) -> Tensor:
            site.module.seen = True
            return site.output + site.param("shift", (site.out_features,))

    with pytest.raises(AssertionError, match="seen"):
        assert_reversible(nn.Linear(4, 4), Sticky(nn.Linear))


def test_small_weights_whose_records_would_all_be_larger_than_copies() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = [layer.weight.detach().clone() for layer in model]
    apply_rules(model, LoraRule(["0", "1"], rank=2, init="random"))
    with torch.no_grad():  # nearly every entry needs a correction
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.mul_(1e3)
    merge(model)
    unmerge(model)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, before, strict=True))


def test_an_idle_adapter_is_removed_beside_a_merged_one() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), torch.randn(3, 4)
    apply_rules(model, LoraRule(["0", "2"], rank=2, init="random"), adapter="merged")
    before, output = Snapshot(model), model(x)
    apply_rules(model, [LoraRule("0", rank=2, init="random"), IA3Rule("2")], adapter="idle")
    activate(model, "merged")
    merge(model)
    merged_output = model(x)
    with pytest.raises(SurgeryError, match="the model is merged"):
        remove(model, "merged")
    remove(model, "idle")
    assert torch.equal(model(x), merged_output) and adapters(model).keys() == {"merged"}
    unmerge(model)
    assert torch.equal(model(x), output) and not before.differences(model)
