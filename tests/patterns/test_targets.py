"""Targets select the modules that PEFT selects, patterns are data, and errors suggest the intended target."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    Pattern,
    PlanError,
    Rule,
    RuleError,
    SurgeryError,
    SurgeryWarning,
    apply_rules,
    explain,
    merge,
    plan_rules,
    rule,
    rules_from_json,
    rules_from_yaml,
    rules_of,
    rules_to_json,
    rules_to_yaml,
)
from surgery.rules import BiasRule, LoraRule, NormRule, TokensRule, TrainRule


class MyLinear(nn.Linear):
    pass


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.query_norm = nn.Linear(4, 4), MyLinear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.query_norm(self.query(x) + self.value(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.again = self.layers[0]
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def sites(rule: Rule, model: nn.Module | None = None) -> list[str]:
    plan = plan_rules(model or Net(), [rule])
    plan.raise_problems()
    return [step.path for step in plan.steps]


QUERIES = [f"layers.{i}.query" for i in range(3)]


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("query", QUERIES),
        (["query"], QUERIES),
        (["layers.1.query"], QUERIES[1:2]),
        (["1.query"], QUERIES[1:2]),
        (r"re:layers\.[02]\.query", [QUERIES[0], QUERIES[2]]),
        (MyLinear, [f"layers.{i}.value" for i in range(3)]),
        ([MyLinear, "head"], [*(f"layers.{i}.value" for i in range(3)), "head"]),
        (Pattern.type(nn.Linear) & ~Pattern.name("value") & ~Pattern.name("head"), QUERIES),
        ("all-linear", [f"layers.{i}.{n}" for i in range(3) for n in ("query", "value")] + ["head"]),
        (Pattern.type("torch.nn.Linear") & Pattern.name("query"), QUERIES),
    ],
    ids=str,
)
def test_targets(targets: Any, expected: list[str]) -> None:
    assert sites(LoraRule(targets)) == expected


def test_exclude_layers_and_expect() -> None:
    assert sites(LoraRule("query", exclude="layers.1.query")) == [QUERIES[0], QUERIES[2]]
    assert sites(LoraRule("query", layers=1)) == QUERIES[1:2]
    assert sites(LoraRule("query", layers=[0, 2], expect=2)) == [QUERIES[0], QUERIES[2]]


def test_a_shared_module_is_one_site_with_its_aliases_told() -> None:
    plan = plan_rules(Net(), [LoraRule("query")])
    assert plan.steps[0].aliases == ("again.query",) and "again.query" in str(plan)
    assert sites(LoraRule("again.query")) == ["again.query"]


def test_all_linear_leaves_the_head_of_a_transformer_out() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=11
    )
    targets = sites(LoraRule("all-linear"), transformers.BertForSequenceClassification(config))
    assert "classifier" not in targets and "bert.pooler.dense" in targets and len(targets) == 7
    targets = sites(LoraRule("all-linear"), transformers.BertForMaskedLM(config))
    assert "cls.predictions.decoder" not in targets


@pytest.mark.parametrize(
    "rules, words",
    [
        ([LoraRule("qurey")], ["matches nothing", "query"]),
        ([LoraRule("query", expect=24)], ["expects 24", "matches 3"]),
        ([LoraRule("query", layers=7)], ["matches nothing", "layers"]),
        ([LoraRule("query_norm")], ["LayerNorm", "layers.0.query_norm"]),
        ([LoraRule("query"), LoraRule(r"re:.*query")], ["two LoraRules", "layers.0.query"]),
        ([LoraRule("head"), TrainRule("head")], ["TrainRule", "LoraRule", "head"]),
        ([LoraRule("query", rank_pattern={"nowhere": 4})], ["rank_pattern", "nowhere"]),
        ([TokensRule("head", tokens=[5])], ["2 rows"]),
        ([], ["the list of rules is empty"]),
    ],
    ids=str,
)
def test_problems_say_what_and_where(rules: list[Rule], words: list[str]) -> None:
    model = Net()
    classes = [type(module) for module in model.modules()]
    plan = plan_rules(model, rules)
    assert not plan and all(word in str(plan.problems[0]) for word in words), plan.problems
    with pytest.raises(SurgeryError):
        apply_rules(model, rules)
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_all_problems_are_told_at_once() -> None:
    plan = plan_rules(Net(), [LoraRule("nothing"), LoraRule("query_norm"), TrainRule("neither")])
    assert len(plan.problems) == 5
    with pytest.raises(SurgeryError, match="5 problems"):
        plan.raise_problems()


@pytest.mark.parametrize("name", ["a.b", "", "training", 3])
def test_adapter_names(name: Any) -> None:
    with pytest.raises(SurgeryError, match="can't name an adapter"):
        apply_rules(Net(), [LoraRule("query")], adapter=name)


def test_an_adapter_name_is_used_once() -> None:
    model = apply_rules(Net(), [LoraRule("query")])
    with pytest.raises(SurgeryError, match="already"):
        apply_rules(model, [LoraRule("value")])


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"rank": 0}, "rank"),
        ({"rank": 2.5}, "rank"),
        ({"rank": True}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"init": "kaimign"}, "init"),
        ({"bias": "some"}, "bias"),
        ({"dtype": "int8"}, "dtype"),
        ({"layers": [-1]}, "layers"),
        ({"expect": -1}, "expect"),
        ({"r": 4}, "PEFT's r is rank"),
        ({"rnk": 4}, "did you mean 'rank'"),
        ({"targets": "re:("}, "regular expression"),
        ({"targets": 7}, "targets"),
    ],
    ids=str,
)
def test_fields_out_of_range(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RuleError, match=words):
        LoraRule(**{"targets": "query", **fields})


def test_explain_tells_every_clause() -> None:
    report = explain(Net(), LoraRule([Pattern.type(nn.Linear) & Pattern.name("key")], exclude="head"), "layers.0.query")
    assert not report
    assert "yes  type(torch.nn.modules.linear.Linear)" in str(report) and "no   name('key')" in str(report)
    assert explain(Net(), LoraRule("query"), "layers.0.query")
    with pytest.raises(SurgeryError, match="layers.0.qery"):
        explain(Net(), LoraRule("query"), "layers.0.qery")


def test_a_target_the_example_never_reaches() -> None:
    class Idle(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    plan = plan_rules(Idle(), [LoraRule(["query", "head"])], example_inputs=torch.randn(2, 4))
    assert [problem.where for problem in plan.problems] == QUERIES
    assert plan_rules(Idle(), [LoraRule("head")], example_inputs=torch.randn(2, 4))


def test_an_example_that_fails_is_told() -> None:
    plan = plan_rules(Net(), [LoraRule("query")], example_inputs=torch.randn(2, 5))
    assert "example call fails" in str(plan.problems[0])


RULES: list[Rule] = [
    LoraRule(["query", nn.Linear, ~Pattern.name("x") & Pattern.has_parameter("bias")], rank=4, alpha=3.5, dora=True,
             rank_pattern={"layers.1.query": 2}, layers=[0, 1], expect=2, dtype=torch.float32),
    TrainRule("head"), BiasRule(), NormRule(), TokensRule("embed", tokens=[3, 1]),
]  # fmt: skip


def test_rules_are_data() -> None:
    assert rules_from_json(rules_to_json(RULES)) == RULES
    pytest.importorskip("yaml")
    assert rules_from_yaml(rules_to_yaml(RULES)) == RULES


def test_rules_of_a_model() -> None:
    model = apply_rules(Net(), [LoraRule("query")])
    apply_rules(model, [TrainRule("head")], adapter="two")
    assert rules_of(model) == [LoraRule("query"), TrainRule("head")] and rules_of(model, "two") == [TrainRule("head")]
    with pytest.raises(SurgeryError, match="did you mean 'two'"):
        rules_of(model, "twoo")


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not JSON"),
        ("{}", "list"),
        ('[{"targets": ["a"]}]', "not a rule"),
        ('[{"rule": "lroa"}]', "did you mean .*'lora'"),
        ('[{"rule": "lora", "version": 99}]', "newer"),
        ('[{"rule": "lora", "version": "1"}]', "version"),
        ('[{"rule": "lora", "rnk": 4}]', "rank"),
        ('[{"rule": "lora", "targets": [{"kind": "x"}]}]', "pattern"),
        ('[{"rule": "lora", "targets": [[1]]}]', "target"),
        ('[{"rule": "lora", "rank": "8"}]', "rank"),
        ('[{"rule": "lora", "rank_pattern": [1]}]', "rank_pattern"),
        ("[7]", "not a rule"),
    ],
)
def test_unreadable_rules(text: str, words: str) -> None:
    with pytest.raises(RuleError, match=words):
        rules_from_json(text)


def test_a_predicate_is_no_data() -> None:
    pattern_rule = LoraRule(Pattern.where(lambda module: True, "always"))
    with pytest.raises(RuleError, match="can't be written"):
        rules_to_json([pattern_rule])
    assert "where(always)" in str(explain(Net(), pattern_rule, "head"))


def test_reading_rules_imports_no_module() -> None:
    text = json.dumps([{"rule": "lora", "version": 1, "targets": [{"type": "antigravity.Linear"}]}])
    code = f"import sys, surgery; surgery.rules_from_json({text!r}); assert 'antigravity' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_engine_is_light() -> None:
    heavy = ("transformers", "networkx", "onnx", "onnxruntime", "rich", "rules", "peft")
    code = f"import sys, surgery; assert not [name for name in {heavy!r} if name in sys.modules]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_rule_name_is_taken_once() -> None:
    with pytest.raises(RuleError, match="taken"):

        @rule("lora")
        class Other(Rule):
            pass


def test_an_entry_that_fits_nothing_is_told() -> None:
    with pytest.warns(SurgeryWarning, match="'valeu', which matches no module of the model; did you mean 'value'"):
        apply_rules(Net(), [LoraRule(["query", "valeu"])])
    with pytest.warns(SurgeryWarning, match="exclude has 'hed'"):
        apply_rules(Net(), [LoraRule("query", exclude="hed")])


def test_misses_say_what_was_perhaps_meant() -> None:
    for target, hint in ((r".*\.head", "begins with 're:'"), ("all_linear", "all-linear"), ("nothing", "are called")):
        with pytest.raises(PlanError, match=hint):
            plan_rules(Net(), [LoraRule(target)]).raise_problems()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"modules_to_save": ["head"]}, "TrainRule"),
        ({"task_type": "SEQ_CLS"}, "TrainRule"),
        ({"init": True}, "'kaiming'"),
    ]
    for fields, hint in wrong:
        with pytest.raises(RuleError, match=hint):
            LoraRule("head", **fields)


def test_predicates_rely_on_what_stands_before_them() -> None:
    small = Pattern.type(nn.Linear) & Pattern.where(lambda module: bool(module.out_features == 2))
    assert sites(LoraRule(small)) == ["head"]
    with pytest.raises(RuleError, match="in_features"):
        plan_rules(Net(), [LoraRule(Pattern.where(lambda module: bool(module.in_features == 4)))])


def test_a_rewritten_model_that_fails_on_the_example_is_given_back() -> None:
    @rule("test-wrong-size")
    class WrongSize(Rule):
        def rewrite(self, site: Any) -> Tensor:
            return site.output + site.param("shift", (site.out_features + 1,))

    model = Net()
    with pytest.raises(SurgeryError, match="WrongSize fails on the example call") as raised:
        apply_rules(model, [WrongSize("layers.1.query")], example_inputs=torch.randn(2, 4))
    assert "layers.1.query" in str(raised.value) and "size" in str(raised.value)
    assert all(type(module) is not None and "adapters" not in module._modules for module in model.modules())


@pytest.mark.parametrize("hook", ["rewrite", "check", "expand", "initialise", "merged"])
def test_a_rule_that_raises_is_named_with_its_site(hook: str) -> None:
    def fail(self: Any, *args: Any) -> Any:
        raise ValueError("on purpose")

    body = {"rewrite": lambda self, site: site.output + site.param("shift", (site.out_features,)), hook: fail}
    rule_class = rule(f"test-raises-{hook}")(type("Raises", (Rule,), body))
    with pytest.raises(SurgeryError, match=rf"Raises.{hook} fails[\s\S]*where:\s+head[\s\S]*ValueError: on purpose"):
        merge(apply_rules(Net(), [rule_class("head")]))
