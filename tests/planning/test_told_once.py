"""Problems, plans and adapters list equal sites once; ranks that no weight can use get a warning or note."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import (
    LoadError,
    MergeError,
    PlanError,
    SurgeryError,
    SurgeryWarning,
    adapters,
    apply_rules,
    load_adapter,
    merge,
    plan_rules,
    remove,
    save_adapter,
    summary,
)
from surgery.rules import AdaLoraRule, ExpertLoraRule, LohaRule, LokrRule, LoraRule, RandLoraRule, TrainRule, VeraRule

MANY = 210


def deep(count: int = MANY, wide: int = 8) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(wide, wide)}) for _ in range(count))
    return model


def lines(error: Any) -> list[str]:
    return str(error).split("\n")


def test_one_reason_at_many_sites_is_one_problem() -> None:
    model = deep()
    for layer in model.layers:  # type: ignore[union-attr]
        torch.nn.utils.parametrizations.weight_norm(layer["up"])
    with pytest.raises(PlanError) as caught:
        apply_rules(model, LoraRule("up", rank=2))
    assert len(caught.value.problems) == MANY
    assert lines(caught.value)[1] == "  where: 210 sites, such as layers.0.up, layers.1.up"
    assert len(lines(caught.value)) == 4


def test_two_reasons_are_two() -> None:
    model = deep()
    model.act = nn.Sequential(nn.Linear(8, 8))
    for layer in model.layers:  # type: ignore[union-attr]
        torch.nn.utils.parametrizations.weight_norm(layer["up"])
    with pytest.raises(PlanError) as caught:
        apply_rules(model, LoraRule(["up", "act"], rank=2))
    message = str(caught.value)
    assert "1. " in message and "2. " in message and "3. " not in message and len(message) < 1500


def test_what_differs_stays_apart() -> None:
    problems = [SurgeryError("too small", where=f"layers.{i}", why=f"it has {i} rows") for i in range(4)]
    assert str(PlanError(problems)).count("too small") == 4
    same = [SurgeryError("too small", where=f"layers.{i}", why="no rows") for i in range(4)]
    assert "where: layers.0, layers.1, layers.2, layers.3" in str(PlanError(same))


def test_merging_and_loading_tell_once() -> None:
    model = apply_rules(deep(), LoraRule("up", rank=2, init="random"))
    folder = save_adapter(model, tempfile.mkdtemp(), format="surgery")
    with torch.no_grad():
        for layer in model.layers:  # type: ignore[union-attr]
            layer["up"].weight = nn.Parameter(layer["up"].weight.to(torch.int8), requires_grad=False)
    with pytest.raises(PlanError) as caught:
        merge(model)
    assert all(isinstance(problem, MergeError) for problem in caught.value.problems)
    assert len(lines(caught.value)) <= 5 and "210 sites, such as layers.0.up, layers.1.up" in str(caught.value)
    with pytest.raises(LoadError) as other:
        load_adapter(deep(wide=4), folder)
    assert len(lines(other.value)) < 20 and len(str(other.value)) < 3000


def test_plans_and_adapters_are_short() -> None:
    plan = plan_rules(deep(), LoraRule("up", rank=2))
    assert len(lines(plan)) == 4  # of which two are the folded row
    assert ["210 sites, such as layers.0.up, layers.1.up"] == [row[1] for row in plan._display_parts()[1].rows]  # type: ignore
    assert f"{MANY * 32:,}" in lines(plan)[2] and len(plan.to_dict()["steps"]) == MANY
    few = plan_rules(deep(3), LoraRule("up", rank=2))
    assert len(lines(few)) == 5
    adapter = adapters(apply_rules(deep(), LoraRule("up", rank=2), adapter="a"))["a"]
    assert len(adapter.sites) == MANY and len(repr(adapter)) < 600
    assert "210 sites, such as 'layers.0.up', 'layers.1.up'" in repr(adapter)
    small = adapters(apply_rules(deep(1), LoraRule("up", rank=2), adapter="a"))["a"]
    assert eval(repr(small), {**vars(surgery), "LoraRule": LoraRule, "Adapter": surgery.Adapter}) == small


def test_a_summary_says_what_is_live() -> None:
    model = apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2), adapter="a")
    apply_rules(model, LoraRule("0", rank=2), adapter="b")
    assert [row[5] for row in summary(model).rows] == ["live", "live"]
    surgery.activate(model, "b", 0.5)
    assert [row[5] for row in summary(model).rows] == ["idle", "live × 0.5"]
    merge(model, "b")
    assert [row[5] for row in summary(model).rows] == ["idle", "merged"] and "merged: b" in str(summary(model))
    assert summary(model).to_dict()["rules"][0]["state"] == "idle"


LOW_RANK = (LoraRule, AdaLoraRule, LohaRule, LokrRule, RandLoraRule, VeraRule)


@pytest.mark.parametrize("kind", LOW_RANK)
def test_a_rank_that_no_weight_can_use_is_a_warning(kind: Any) -> None:
    wide = nn.Sequential(nn.Linear(384, 48), nn.Linear(48, 48))
    with pytest.warns(SurgeryWarning, match="rank 500 is more .* the largest useful rank is 48") as issued_warnings:
        apply_rules(wide, kind(["0", "1"], rank=500))
    assert len(issued_warnings) == 1
    assert "the largest useful rank is 48" in str(plan_rules(remove(wide), kind(["0", "1"], rank=500)))


def test_one_warning_a_rule_and_none_for_ranks_that_fit() -> None:
    with pytest.warns(SurgeryWarning) as issued_warnings:
        apply_rules(deep(), [LoraRule("up", rank=9), TrainRule("layers.3.up")][:1])
    assert [str(warning.message) for warning in issued_warnings] == [
        "LoraRule: rank 9 is more than the weights at 210 sites, such as layers.0.up, layers.1.up can use; "
        "the largest useful rank is 8"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_rules(deep(3, 12), LoraRule("up", rank=12))


def test_ranks_are_read_by_patterns_and_shapes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Embedding(10, 4), nn.Linear(8, 8))
    plan = plan_rules(model, LoraRule(["0", "1", "2"], rank=4, rank_pattern={"0": 30}))
    assert len(plan.warnings) == 1 and "rank 30 is more than the weights at 0 can use" in plan.warnings[0]
    assert "largest useful rank is 16" in plan.warnings[0]


def test_every_matrix_of_a_module_is_asked_for_its_rank() -> None:
    """Modules without a `weight`: stacks of experts, whose matrices have paths of their own, and attention."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(3, 16, 8)), nn.Parameter(torch.randn(3, 8, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.up[0].T @ self.down[0].T

    model = nn.Sequential(Experts(), nn.MultiheadAttention(8, 2, kdim=4))
    plan = plan_rules(model, ExpertLoraRule("0", rank=9, init="random"))
    assert plan.notes == [
        "ExpertLoraRule: rank 9 is more than the weights at 0.up, 0.down can use; the largest useful rank is 8"
    ]
    plan = plan_rules(model, ExpertLoraRule("0", rank=2, rank_pattern={"up": 17}))
    assert plan.warnings == [
        "ExpertLoraRule: rank 17 is more than the weights at 0.up can use; the largest useful rank is 8"
    ]
    plan = plan_rules(model, LoraRule("1", rank=6))
    assert plan.notes == [
        "LoraRule: rank 6 is more than the weights at 1.k_proj_weight can use; the largest useful rank is 4"
    ]
    assert not plan_rules(model, ExpertLoraRule("0", rank=7)).notes


def test_the_groups_of_a_convolution_have_ranks_of_their_own() -> None:
    """The rank is divided among the groups, and each group has a block of the weight with full rank."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 16, 1, groups=8)
    model = nn.Sequential(layer)
    plan = plan_rules(model, LoraRule("0", rank=16, init="random"))
    assert not plan.warnings and not plan.notes
    before = layer.weight.detach().clone()
    merge(apply_rules(model, LoraRule("0", rank=16, init="random")))
    change = (layer.weight - before).view(8, 2, 2)
    assert torch.linalg.matrix_rank(torch.block_diag(*change)) == 16
    assert plan_rules(nn.Sequential(nn.Conv2d(16, 16, 1, groups=8)), LoraRule("0", rank=24)).warnings


def test_a_small_head_among_others_is_a_note() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    plan = plan_rules(model, LoraRule(nn.Linear, rank=4))
    assert not plan.warnings and plan.notes == [
        "LoraRule: rank 4 is more than the weights at 1 can use; the largest useful rank is 2"
    ]
    assert f"note: {plan.notes[0]}" in str(plan)


def test_a_rank_that_nobody_chose_is_none_to_warn_of() -> None:
    plan = plan_rules(nn.Sequential(nn.Linear(4, 2)), LoraRule("0"))
    assert not plan.warnings and not plan.notes


def test_no_warning_of_a_rank_comes_from_a_file() -> None:
    with pytest.warns(SurgeryWarning, match="largest useful rank"):
        model = apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=16))
    folder = save_adapter(model, tempfile.mkdtemp())
    assert load_adapter(remove(model), folder)
