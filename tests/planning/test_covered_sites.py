"""BiasRule and NormRule beside rules that take whole modules: each parameter is trained once, as in PEFT."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from surgery import PlanError, Rule, apply_rules, hotswap, load_adapter, merge, plan_rules, save_adapter, unmerge
from surgery.adapter_files.tensor_files import open_tensors
from surgery.rules import BiasRule, LoraRule, NormRule, ReplaceRule, TokensRule, TrainRule


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.query, self.value, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.classifier = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.classifier(self.norm(self.query(x) + self.value(x)))


IDS = torch.tensor([[1, 2, 8]])
HEAD = [f"classifier.{i}.{name}" for i in (0, 1, 2) for name in ("weight", "bias")]


def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


def trained(rules: list[Rule]) -> list[str]:
    adapted = apply_rules(model(), rules)
    names = [name.replace("adapters.default.", "") for name, p in adapted.named_parameters() if p.requires_grad]
    assert torch.equal(adapted(IDS), model()(IDS))
    return sorted(names)


@pytest.mark.parametrize("last", [True, False])
def test_biases_of_trained_modules_are_theirs(last: bool) -> None:
    both = [TrainRule("classifier"), BiasRule()]
    wanted = sorted([*HEAD, "query.bias", "value.bias", "norm.bias"])
    assert trained(both if last else both[::-1]) == wanted
    lora = [LoraRule("query", rank=2, bias="all"), TrainRule("classifier")]
    assert trained(lora if last else lora[::-1]) == sorted([*wanted, "query.A", "query.B"])


def test_norms_and_rows_beside_them() -> None:
    norm = ["norm.weight", "norm.bias"]
    assert trained([TrainRule("classifier"), NormRule(), BiasRule()]) == sorted(
        [*HEAD, *norm, "query.bias", "value.bias"]
    )
    named = [NormRule("norm"), BiasRule(["norm", "query"])]
    assert trained(named) == sorted([*norm, "query.bias"])
    rows = [TokensRule("classifier.2", tokens=[1]), BiasRule(["classifier.2"])]
    assert trained(rows) == ["classifier.2.bias", "classifier.2.rows"]


def test_two_rules_with_all_biases_train_them_once() -> None:
    wanted = sorted(["query.A", "query.B", "value.A", "value.B", *trained([BiasRule()])])
    assert trained([LoraRule("query", rank=2, bias="all"), LoraRule("value", rank=3, bias="all")]) == wanted
    assert trained([LoraRule(["query", "value"], rank=2, bias="lora_only"), BiasRule()]) == wanted


def test_a_replaced_module_has_no_bias_of_the_model() -> None:
    other = ReplaceRule("query", by=nn.Linear, kwargs={"in_features": 4, "out_features": 4}, inherit=True)
    plan = plan_rules(model(), [other, BiasRule()])
    assert plan and [step.path for step in plan.steps if step.rule.name == "bias"] == [
        "value", "norm", "classifier.0", "classifier.1", "classifier.2",
    ]  # fmt: skip
    with pytest.raises(PlanError, match="ReplaceRule and BiasRule go to the same module"):
        apply_rules(model(), [other, BiasRule("query")])


def test_a_named_rule_with_nothing_left_is_an_error() -> None:
    with pytest.raises(PlanError, match="BiasRule finds nothing to do") as caught:
        apply_rules(model(), [TrainRule("classifier"), BiasRule("classifier.0")])
    assert "leave this BiasRule out" in str(caught.value)
    with pytest.raises(PlanError, match="it has no bias"):  # the rule would not train anything there either way
        apply_rules(model(), [TrainRule("embed"), BiasRule("embed")])


@pytest.mark.parametrize("rules", ([LoraRule("query", rank=2, bias="all")], [LoraRule("query", rank=2), BiasRule()]))
def test_the_file_is_peft_s(tmp_path: Path, rules: list[Rule]) -> None:
    config = peft.LoraConfig(r=2, target_modules=["query"], bias="all", modules_to_save=["classifier"])
    theirs: Any = peft.get_peft_model(model(), config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "peft")
    ours = apply_rules(model(), [*rules, TrainRule("classifier")])
    for tensor in (parameter for parameter in ours.parameters() if parameter.requires_grad):
        nn.init.normal_(tensor, std=0.1)
    save_adapter(ours, tmp_path / "ours", format="peft")
    file, wanted = (open_tensors(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    again = [key for key in wanted.shapes if ".modules_to_save." in key or ".original_module." in key]
    assert len(again) == 6  # PEFT writes the classifier's biases twice more, under names that it does not read
    assert dict(file.shapes) == {key: shape for key, shape in wanted.shapes.items() if key not in again}
    theirs_again: Any = peft.PeftModel.from_pretrained(model(), str(tmp_path / "ours")).eval()
    assert torch.allclose(theirs_again(IDS), ours(IDS), atol=1e-6)  # sums of two matrix products in another order
    loaded = model()
    load_adapter(loaded, tmp_path / "peft")
    assert torch.allclose(loaded(IDS), theirs.eval()(IDS), atol=1e-6)
    hotswap(ours, "default", tmp_path / "peft")
    assert torch.equal(ours(IDS), loaded(IDS))
    adapted = ours(IDS)
    merge(ours)
    assert torch.allclose(ours(IDS), adapted, atol=1e-6)
    unmerge(ours)
    assert torch.equal(ours(IDS), adapted)


def fix_of(rules: list[Rule]) -> str:
    with pytest.raises(PlanError) as caught:
        apply_rules(model(), rules)
    (problem,) = caught.value.problems
    assert problem.fix
    return problem.fix


def test_the_fix_of_a_conflict_works() -> None:
    lora = LoraRule(["query", "classifier.0"], rank=2)
    fix = fix_of([TrainRule("classifier"), lora])  # `exclude` of the TrainRule can't leave out a part of its target
    assert 'LoraRule(…, exclude="classifier.0"), or give them different adapters' in fix
    assert trained([TrainRule("classifier"), lora.replace(exclude="classifier.0")]) == sorted(
        [*HEAD, "query.A", "query.B"]
    )
    apply_rules(apply_rules(model(), TrainRule("classifier"), adapter="a"), lora, adapter="b")


def test_a_fix_does_not_name_what_would_not_work() -> None:
    fix = fix_of([TrainRule("query"), TrainRule(["query", "value"])])
    excluded = re.search('exclude="(.*)"', fix)
    assert excluded and "different adapters" not in fix  # which could not be live together
    assert len(trained([TrainRule("query"), TrainRule(["query", "value"], exclude=excluded[1])])) == 4
    assert fix_of([TrainRule("query"), LoraRule("query")]).startswith("leave out one of the rules")
