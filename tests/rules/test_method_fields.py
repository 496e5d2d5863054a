"""The fields of the methods beside LoRA: their values, and the modules that a rule refuses."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from surgery import PlanError, Rule, RuleError, apply_rules, plan_rules, rules_from_json, rules_to_json
from surgery.rules import BoftRule, HraRule, IA3Rule, LohaRule, LokrRule, MissRule, OftRule, RoadRule, VeraRule
from tests.support.methods import METHODS, Activated, Holder


@pytest.mark.parametrize("name", METHODS)
def test_rules_are_written_and_read(name: str) -> None:
    assert rules_from_json(rules_to_json([METHODS[name].rule])) == [METHODS[name].rule]


@pytest.mark.parametrize(
    "kind, bad",
    [
        (IA3Rule, {"init": "ones"}),
        (IA3Rule, {"feedforward": [3]}),
        (VeraRule, {"rank": 0}),
        (VeraRule, {"dropout": 1.0}),
        (VeraRule, {"d_initial": "x"}),
        (VeraRule, {"projection_prng_key": -1}),
        (LohaRule, {"rank": 1.5}),
        (LohaRule, {"alpha": 0}),
        (LohaRule, {"init": "lycoris"}),
        (LohaRule, {"rank_pattern": {"m": 0}}),
        (LohaRule, {"alpha_pattern": {"(": 1}}),
        (LohaRule, {"alpha_pattern": {"m": -1}}),
        (LokrRule, {"decompose_factor": 0}),
        (LokrRule, {"decompose_both": 1}),
        (OftRule, {"blocks": 2}),
        (OftRule, {"block_size": 0}),
        (OftRule, {"eps": 0}),
        (OftRule, {"num_cayley_neumann_terms": 0}),
        (BoftRule, {"blocks": 2}),
        (BoftRule, {"n_butterfly_factor": 0}),
        (HraRule, {"apply_GS": "yes"}),
        (MissRule, {"variant": "mono"}),
        (MissRule, {"dropout": 0.5, "variant": "bat"}),
        (RoadRule, {"variant": "road_3"}),
        (RoadRule, {"group_size": 3}),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_told(kind: type[Rule], bad: dict[str, Any]) -> None:
    with pytest.raises(RuleError, match=next(iter(bad))):
        kind("m", **bad)


@pytest.mark.parametrize(
    "rule, module, why",
    [
        *((METHODS[name].rule, nn.LayerNorm(4), "it goes on") for name in METHODS),
        (VeraRule("m"), nn.Conv2d(4, 4, 1), "it goes on Linear and transformers' Conv1D"),
        (RoadRule("m", group_size=8), nn.Linear(4, 12), "does not divide its 12 outputs"),
        (VeraRule("m", dropout=0.1), Activated(4, 12), "no input to act on: its forward is not a plain linear map"),
        (OftRule("m"), nn.Linear(50, 4), "does not divide the 50 numbers .* 25 does"),
        (OftRule("m", block_size=0, blocks=3), nn.Linear(50, 4), "blocks=3"),
        (BoftRule("m", n_butterfly_factor=3), nn.Linear(24, 4), "3 butterfly factors"),
        (HraRule("m", rank=5), nn.Linear(4, 4), "rank=5"),
        (MissRule("m", rank=5), nn.Linear(4, 4), "pieces of rank=5"),
        (MissRule("m", rank=2, variant="bat"), nn.Linear(4, 3), "pieces of rank=2"),
        (MissRule("m", rank=2, variant="mini", mini_r=2), nn.Linear(4, 3), "mini_r=2"),
        (IA3Rule("m", feedforward="n"), nn.Linear(4, 4), "feedforward has 'n'"),
        (LohaRule("m", rank_pattern={"n": 2}), nn.Linear(4, 4), "rank_pattern has 'n'"),
    ],
    ids=str,
)
def test_what_can_not_be_done_is_told(rule: Rule, module: nn.Module, why: str) -> None:
    model = Holder(module)
    with pytest.raises(PlanError, match=why):
        apply_rules(model, [rule])
    assert type(model.m) is type(module) and not plan_rules(model, [rule])
