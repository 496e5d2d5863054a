"""An adapter freezes the base if its rules train something, or if the call says so; `remove` restores all flags."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import SurgeryError, apply_rules, load_adapter, load_adapters, plan_rules, remove, save_adapter
from surgery.peft import LoraConfig, get_peft_model
from surgery.rules import CaptureRule, LoraRule, ReplaceRule, StatisticsRule, SteerRule, captured
from surgery.testing import Snapshot

LOOKS: dict[str, Any] = {
    "capture": CaptureRule("0"),
    "steer": SteerRule("0", direction=[1.0] * 4),
    "statistics": StatisticsRule("1"),
    "replace": ReplaceRule("2", by="torch.nn.SiLU"),
}
TRAINS = LoraRule("3", rank=2, init="random")


def net() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    model[3].bias.requires_grad_(False)
    return model


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters() if ".adapters." not in name}


BEFORE = flags(net())
FROZEN = dict.fromkeys(BEFORE, False)


@pytest.mark.parametrize("name", LOOKS)
def test_rules_that_train_nothing_leave_the_base_as_it_trains(name: str) -> None:
    model, plan = net(), plan_rules(net(), LOOKS[name])
    assert not plan.freezes and "the base is not frozen" in str(plan) and plan.to_dict()["freezes"] is False
    assert not plan.statistics and not plan.notes
    whole = Snapshot(model)
    apply_rules(model, LOOKS[name])
    assert flags(model) == BEFORE
    remove(model)
    assert not whole.differences(model)


def test_a_model_under_capture_trains_as_without_and_keeps_what_it_learned() -> None:
    model, plain, x = net(), net(), torch.randn(5, 4)
    apply_rules(model, CaptureRule("0"))
    for network in (model, plain):
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
    remove(model)
    assert all(torch.equal(tensor, plain.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_what_is_captured_has_a_history() -> None:
    model, x = apply_rules(net(), CaptureRule("0")), torch.randn(5, 4)
    with captured(model, detach=False) as captures:
        model(x)
    wanted = model[0](x).square().sum()
    (activation,) = captures["0"]
    got = torch.autograd.grad(activation.square().sum(), model[0].weight)
    assert torch.equal(got[0], torch.autograd.grad(wanted, model[0].weight)[0])


@pytest.mark.parametrize("freeze", [True, False])
def test_the_call_decides(freeze: bool) -> None:
    for rule in (TRAINS, CaptureRule("0")):
        model, plan = net(), plan_rules(net(), rule, freeze=freeze)
        assert plan.freezes is freeze and plan.freeze is freeze
        assert f"the base is {'frozen' if freeze else 'not frozen'}" in str(plan)
        apply_rules(model, rule, freeze=freeze)
        assert flags(model) == (FROZEN if freeze else BEFORE)
        assert flags(remove(model)) == BEFORE


def test_the_plan_says_that_nothing_trains() -> None:
    assert "nothing trains" in str(plan_rules(net(), CaptureRule("0"), freeze=True))
    model = apply_rules(net(), TRAINS, adapter="a")
    assert "the base stays frozen by a" in str(plan_rules(model, CaptureRule("0")))


def test_what_is_no_answer_is_refused() -> None:
    model = net()
    with pytest.raises(SurgeryError, match="freeze='no'"):
        apply_rules(model, TRAINS, freeze="no")  # type: ignore[arg-type]
    assert flags(model) == BEFORE and not hasattr(model[3], "adapters")


@pytest.mark.parametrize("come", list(itertools.permutations("cl")))
@pytest.mark.parametrize("go", list(itertools.permutations("cl")))
@pytest.mark.parametrize("between", ["", "deepcopy", "pickle", "idle"])
def test_two_adapters_come_and_go_in_any_order(come: tuple[str, ...], go: tuple[str, ...], between: str) -> None:
    model, rules = net().train(), {"c": CaptureRule("0"), "l": TRAINS}
    facts = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapter_names = set[str]()
    for name in come:
        apply_rules(model, rules[name], adapter=name)
        adapter_names.add(name)
        assert flags(model) == (FROZEN if "l" in adapter_names else BEFORE)
        if "l" in adapter_names:
            model(torch.randn(5, 4))  # changes the running statistics, which `remove` restores
    if between == "deepcopy":
        model = copy.deepcopy(model)
    elif between == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif between == "idle":
        surgery.deactivate(model)
        assert all(torch.equal(tensor, facts[key]) for key, tensor in surgery.base_state_dict(model).items())
        surgery.activate(model)
    for name in go:
        remove(model, name)
        adapter_names.discard(name)
        assert flags(model) == (FROZEN if "l" in adapter_names else BEFORE)
    assert all(torch.equal(tensor, facts[key]) for key, tensor in model.state_dict().items())


def test_the_statistics_rest_with_the_adapters_that_froze_the_base() -> None:
    model = apply_rules(apply_rules(net(), TRAINS, adapter="l"), CaptureRule("0"), adapter="c")
    before = model[1].running_mean.clone()
    model(torch.randn(5, 4))
    moved = model[1].running_mean.clone()
    surgery.activate(model, "c")
    assert torch.equal(model[1].running_mean, before)
    surgery.activate(model, ["l", "c"])
    assert torch.equal(model[1].running_mean, moved) and not torch.equal(moved, before)
    assert torch.equal(remove(model, "l")[1].running_mean, before)


def test_thawed_parameters_stay_so_until_the_base_is_asked_to_freeze() -> None:
    model = apply_rules(net(), TRAINS, adapter="a")
    model[0].weight.requires_grad_(True)
    apply_rules(model, LoraRule("0", rank=2), adapter="b")
    assert model[0].weight.requires_grad
    apply_rules(model, LoraRule("0", rank=2), adapter="c", freeze=True)
    assert flags(model) == FROZEN
    remove(model, ["c", "a"])
    assert flags(model) == FROZEN and flags(remove(model)) == BEFORE


def test_flags_that_change_under_a_rule_that_froze_nothing_are_the_users() -> None:
    model = apply_rules(net(), CaptureRule("0"), adapter="c")
    model[0].weight.requires_grad_(False)
    apply_rules(model, TRAINS, adapter="l")
    remove(model)
    assert flags(model) == {**BEFORE, "0.weight": False}


def test_copies_and_sums_freeze_as_their_sources_do() -> None:
    for freeze in (True, False):
        model = apply_rules(net(), TRAINS, adapter="a", freeze=freeze)
        surgery.copy_adapter(model, "a", "b")
        surgery.combine(model, {"a": 0.5, "b": 0.5}, into="c")
        surgery.rename_adapter(model, "c", "d")
        wanted = FROZEN if freeze else BEFORE
        for name in ("a", "b"):
            assert flags(remove(model, name)) == wanted
        assert flags(remove(model)) == BEFORE


def test_a_merge_for_good_gives_the_flags_back() -> None:
    model = apply_rules(apply_rules(net(), TRAINS, adapter="l"), CaptureRule("0"), adapter="c")
    surgery.merge(model, "l")
    surgery.forget(model)
    assert flags(model) == BEFORE and surgery.active(model) == ("c",)
    assert flags(remove(model)) == BEFORE


def test_loading(tmp_path: Path) -> None:
    apply_rules(model := net(), TRAINS, adapter="l")
    apply_rules(model, SteerRule("0", direction=[1.0] * 4), adapter="s")
    for name in ("l", "s"):
        save_adapter(model, tmp_path / name, name)
    for name, freeze, wanted in [("l", None, FROZEN), ("l", False, BEFORE), ("s", None, BEFORE), ("s", True, FROZEN)]:
        load_adapter(again := net(), tmp_path / name, freeze=freeze)
        assert flags(again) == wanted and flags(remove(again)) == BEFORE
    for options, wanted in [({}, FROZEN), ({"freeze": False}, BEFORE)]:
        load_adapters(again := net(), tmp_path, **options)
        assert flags(again) == wanted and flags(remove(again)) == BEFORE
    load_adapter(again := net(), tmp_path / "l", freeze=False)
    surgery.hotswap(again, "default", tmp_path / "l")
    assert flags(again) == BEFORE


def test_base_and_adapter_train_together() -> None:
    model, x = apply_rules(net(), TRAINS, freeze=False).eval(), torch.randn(5, 4)
    box = model[3].adapters.default

    def plain(weight: Tensor) -> Tensor:
        hidden = model[2](model[1](model[0](x)))
        return nn.functional.linear(hidden, weight + 4 * box.B @ box.A, model[3].bias)  # alpha 8, rank 2

    wanted = torch.autograd.grad(plain(model[3].weight).square().sum(), [model[3].weight, model[0].weight, box.A])
    gradients = torch.autograd.grad(model(x).square().sum(), [model[3].weight, model[0].weight, box.A])
    for grad, want in zip(gradients, wanted, strict=True):
        assert torch.allclose(grad, want, rtol=1e-4, atol=1e-5)  # sums in another order


def test_the_facade_freezes_as_peft_does(tmp_path: Path) -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["3"]))
    assert flags(model.get_base_model()) == FROZEN
