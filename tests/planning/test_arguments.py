"""Wrong values for a model or rules: the error is a clear sentence with a remedy, and the model is unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import surgery
from surgery import Pattern, PlanError, RuleError, apply_rules, explain, plan_rules, rules, rules_from_json, rules_of
from surgery.errors import SurgeryError
from surgery.rules import BiasRule, CaptureRule, LoraRule, ReplaceRule
from surgery.testing import Snapshot


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))


NOT_RULES: list[tuple[str, Any, str, str]] = [
    ("none", None, "None is not a rule", "LoraRule(targets=…)"),
    ("class", LoraRule, "LoraRule is a class, not a rule", "LoraRule(targets=…)"),
    ("foreign class", nn.Linear, "Linear is a class, not a rule", "LoraRule(targets=…)"),
    ("name", "query", "'query' is a text, not a rule", "LoraRule('query')"),
    ("yaml path", "lora.yaml", "'lora.yaml' is a path, not a rule", "rules_from_yaml(Path('lora.yaml').read_text())"),
    ("json path", Path("lora.json"), "'lora.json' is a path", "rules_from_json(Path('lora.json').read_text())"),
    ("yaml text", "- rule: lora\n  targets: [query]", "is a text, not a rule", "rules_from_yaml(text)"),
    ("json text", '[{"rule": "lora"}]', "is a text, not a rule", "rules_from_json(text)"),
    ("bytes", b"lora", "bytes are not a rule", "rules_from_json"),
    ("mapping", {"rule": "lora"}, "is a mapping, not a rule", "Rule.from_dict"),
    ("module", nn.ReLU(), "ReLU is a module, not a rule", "the model is the first argument"),
    ("number", 3, "3 is not a rule", "LoraRule(targets=…)"),
]


@pytest.mark.parametrize(("value", "what", "fix"), [row[1:] for row in NOT_RULES], ids=[row[0] for row in NOT_RULES])
@pytest.mark.parametrize("listed", [False, True])
def test_what_is_not_a_rule_is_one_problem_with_its_remedy(value: Any, what: str, fix: str, listed: bool) -> None:
    net = model()
    before = Snapshot(net)
    passed = [LoraRule("0"), value] if listed else value
    with pytest.raises(PlanError) as caught:
        apply_rules(net, passed)
    (problem,) = caught.value.problems
    assert what in problem.what and fix in str(problem.fix)
    assert before.differences(net) == []
    assert len(plan_rules(net, passed).problems) == 1
    with pytest.raises(RuleError, match="not a rule"):
        explain(net, value, "0")


def test_configurations_of_peft_name_the_way_that_takes_them() -> None:
    peft: Any = pytest.importorskip("peft", reason="passes PEFT's configurations")
    from surgery import peft as facade

    for config in (
        peft.LoraConfig(),
        peft.IA3Config(),
        peft.PromptTuningConfig(),
        facade.LoraConfig(),
        facade.OFTConfig(),
    ):
        for passed in (config, [config]):
            with pytest.raises(PlanError, match=f"{type(config).__name__} is a configuration of PEFT") as caught:
                apply_rules(model(), cast(Any, passed))
            assert "get_peft_model(model, config)" in str(caught.value) and len(str(caught.value)) < 400


def test_lists_in_lists_and_empty_lists() -> None:
    assert "one flat list" in str(plan_rules(model(), [[LoraRule("0")]]).problems[0])  # type: ignore[list-item]
    assert "the list of rules is empty" in str(plan_rules(model(), []).problems[0])


def test_rules_may_come_from_a_generator_and_are_remembered() -> None:
    net = apply_rules(model(), (rule for rule in (LoraRule("0", rank=2), BiasRule("2"))))
    assert list(rules_of(net)) == [LoraRule("0", rank=2), BiasRule("2")]


@pytest.mark.parametrize(
    ("value", "what", "fix"),
    [
        ("bert-base-uncased", "is not a model", "AutoModel.from_pretrained('bert-base-uncased')"),
        (nn.Linear, "Linear is a class, not a model", "Linear(…)"),
        ([LoraRule("0")], "a rule, not a model", "the rules are the second"),
        (LoraRule("0"), "a rule, not a model", "the rules are the second"),
        (torch.zeros(2), "is not a model", "torch.nn.Module"),
    ],
)
def test_what_is_not_a_model(value: Any, what: str, fix: str) -> None:
    (problem,) = plan_rules(value, [LoraRule("0")]).problems
    assert what in problem.what and fix in str(problem.fix)


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_paths_in_the_place_of_text(kind: str, tmp_path: Path) -> None:
    if kind == "yaml":
        pytest.importorskip("yaml", reason="reads YAML")
    read, write = getattr(surgery, f"rules_from_{kind}"), getattr(surgery, f"rules_to_{kind}")
    file = tmp_path / f"rules.{kind}"
    file.write_text(write([LoraRule("0")]))
    for path in (file, str(file)):
        with pytest.raises(RuleError, match=rf"is a path, not {kind.upper()} text(.|\n)*read_text"):
            read(path)
    with pytest.raises(RuleError, match=f"3 is not {kind.upper()} text"):
        read(3)
    assert read(file.read_text()) == [LoraRule("0")]
    with pytest.raises(RuleError, match="list of mappings"):
        read('"just words"')


def test_broken_json_says_what_is_read() -> None:
    with pytest.raises(RuleError, match="not JSON(.|\n)*rules_to_json"):
        rules_from_json("{")
    assert rules_from_json(json.dumps([LoraRule("0").to_dict()])) == [LoraRule("0")]


# Types as targets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["Linear", "nn.Linear", "torch.nn.Linear", "torch.nn.modules.linear.Linear"])
def test_a_types_name_as_a_target_says_how_it_is_written(word: str) -> None:
    (problem,) = plan_rules(model(), [LoraRule(word)]).problems
    assert "write Pattern.type('torch.nn.Linear')" in str(problem.why)
    for rule in (LoraRule(["0", word]), LoraRule("0", exclude=word)):
        (warning,) = plan_rules(model(), [rule]).warnings
        assert "write Pattern.type('torch.nn.Linear')" in warning
    assert len(plan_rules(model(), [LoraRule(Pattern.type("torch.nn.Linear"))]).steps) == 1


def test_a_type_that_the_model_does_not_have() -> None:
    assert "Pattern.type('torch.nn.Conv2d')" in str(plan_rules(model(), [LoraRule("Conv2d")]).problems[0].why)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("Linear", "torch.nn.Linear"), ("nn.Linear", "torch.nn.Linear"), ("torch.nn.Liner", "torch.nn.Linear")],
)
def test_a_type_under_another_name_has_near_misses(name: str, meant: str) -> None:
    assert repr(meant) in str(plan_rules(model(), [LoraRule(Pattern.type(name))]).problems[0].why)


def test_a_modules_name_is_not_taken_for_a_type() -> None:
    net = nn.Module()
    net.Linear = nn.Linear(4, 4)
    net.forward = net.Linear.forward
    assert [step.path for step in plan_rules(net, [LoraRule("Linear")]).steps] == ["Linear"]


# Plans that leave nothing to train ------------------------------------------------------------------------------


def test_a_plan_that_leaves_nothing_to_train_says_so() -> None:
    net = model()
    for rule in (ReplaceRule(nn.ReLU, by=nn.GELU), CaptureRule("0")):
        assert not plan_rules(net, [rule]).notes  # the base trains
        plan = plan_rules(net, [rule], freeze=True)
        assert plan and "nothing trains" in str(plan) and plan.to_dict()["notes"] == plan.notes
    assert plan_rules(net, [CaptureRule("0"), LoraRule("0", rank=2)]).notes == []
    apply_rules(net, LoraRule("0", rank=2), adapter="trained")
    assert plan_rules(net, [CaptureRule("0")]).notes == []


def test_replacements_train_as_asked() -> None:
    frozen = nn.LayerNorm(4).requires_grad_(False)
    for trainable, by, expected in ((None, frozen, 0), (True, frozen, 8), (False, nn.LayerNorm(4), 0)):
        net = apply_rules(model(), ReplaceRule("2", by=by, trainable=trainable), freeze=True)
        trained_parameters = [p for p in net.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained_parameters) == expected
        if expected:
            net(torch.randn(3, 4)).square().sum().backward()
            assert all(p.grad is not None for p in trained_parameters)
    with pytest.raises(SurgeryError, match="trainable"):
        ReplaceRule("2", by=frozen, trainable="yes")  # type: ignore[arg-type]


# What the packages offer ----------------------------------------------------------------------------------------


def test_the_packages_list_their_public_names_alone() -> None:
    assert sorted(dir(surgery)) == sorted(surgery.__all__) and sorted(dir(rules)) == sorted(rules.__all__)
    assert surgery.__version__.split(".")[0].isdigit()
