"""Files of adapters with structural rules, and of adapters that were trained on a model with another structure."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from surgery import (
    LoadError,
    SurgeryError,
    SurgeryWarning,
    active,
    adapters,
    apply_rules,
    load_adapter,
    load_adapters,
    remove,
    save_adapter,
)
from surgery.rules import DropRule, LoraRule, ReorderRule, RepeatRule
from surgery.testing import Snapshot
from tests.support.stack import stack

IDS = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = dict(vocab_size=50, hidden_size=32, num_attention_heads=4, intermediate_size=64)


def llama(layers: int = 4, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SIZES, **settings)).eval()


def lora(**fields: Any) -> LoraRule:
    return LoraRule("q_proj", rank=2, init="random", **fields)


STRUCTURES = [
    DropRule("model.layers.3"),
    DropRule(["model.layers.0", "model.layers.2"]),
    RepeatRule("model.layers", order=[0, 1, 2, 3, 0, 2]),
    RepeatRule("model.layers", order=[0, 0, 3], shared=True),
    ReorderRule("model.layers", order=[0, 2, 1, 3]),
]


MODELS = [stack, *([llama] if os.environ.get("ALL_STRUCTURE") else [])]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("rule", STRUCTURES, ids=lambda rule: rule.label)
def test_structure_and_tensors_come_back_on_the_plain_base(rule: Any, make: Any, tmp_path: Path) -> None:
    model = apply_rules(make(), [lora(), rule], adapter="a")
    wanted = model(IDS).logits
    save_adapter(model, tmp_path, "a")
    other = make()
    before = Snapshot(other)
    report = load_adapter(other, tmp_path, "b")
    assert len(report.loaded) == 2 * len(model.model.layers) and not report.base
    assert torch.equal(other(IDS).logits, wanted)
    assert before.differences(remove(other)) == []


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("rule", STRUCTURES, ids=lambda rule: rule.label)
def test_a_structure_alone_has_a_file_without_tensors(rule: Any, make: Any, tmp_path: Path) -> None:
    model = apply_rules(make(), rule)
    save_adapter(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter.safetensors", "rules.json"]
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert list(file.keys()) == []
    other = make()
    assert load_adapter(other, tmp_path).loaded == [] and torch.equal(other(IDS).logits, model(IDS).logits)
    assert json.loads((tmp_path / "rules.json").read_text())["rules"] == [rule.to_dict()]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("rule", STRUCTURES, ids=lambda rule: rule.label)
def test_an_adapter_of_another_structure_is_refused(rule: Any, make: Any, tmp_path: Path) -> None:
    """The names may agree: a model without its last layer has the names of the first layers."""
    model = apply_rules(apply_rules(make(), rule, adapter="cut"), lora(), adapter="a")
    wanted = model(IDS).logits
    save_adapter(model, tmp_path, "a", format="surgery")
    other = make(max(4, len(model.model.layers)))  # so that names agree
    before = Snapshot(other)
    with pytest.raises(LoadError, match="it was made on another base") as error:
        load_adapter(other, tmp_path)
    assert before.differences(other) == []
    if len(model.model.layers) != len(other.model.layers):
        assert "with the same structural rules applied first" in str(error.value)
    same = apply_rules(make(), rule, adapter="cut")
    load_adapter(same, tmp_path, "a")
    assert torch.equal(same(IDS).logits, wanted)


def test_the_last_layer_dropped_is_said_by_numbers(tmp_path: Path) -> None:
    model = apply_rules(apply_rules(llama(), DropRule("model.layers.3"), adapter="cut"), lora(), adapter="a")
    save_adapter(model, tmp_path, "a")
    with pytest.raises(LoadError, match="model.layers has 4 layers here and had 3"):
        load_adapter(llama(), tmp_path, strict=True)
    with pytest.warns(SurgeryWarning) as warned:
        load_adapter(llama(), tmp_path, strict=False)
    assert "4 layers here and had 3" in " ".join(str(warning.message) for warning in warned)
    whole = apply_rules(llama(), lora(), adapter="a")
    save_adapter(whole, tmp_path / "whole", "a")
    cut = apply_rules(llama(), DropRule("model.layers.3"))
    with pytest.raises(LoadError, match="model.layers has 3 layers here and had 4"):
        load_adapter(cut, tmp_path / "whole", "a")


def test_two_layers_exchanged_between_those_that_are_compared(tmp_path: Path) -> None:
    """Sixteen weights of many are compared; two numbers of each layer tell layers apart."""
    order = [*range(24)]
    order[8], order[10] = 10, 8  # no weight of these layers is among the sixteen
    model = apply_rules(stack(24), lora(), adapter="a")
    save_adapter(model, tmp_path, "a")
    with pytest.raises(LoadError, match="other layers are at 8, 10 of model.layers"):
        load_adapter(apply_rules(stack(24), ReorderRule("model.layers", order=order)), tmp_path, "a")


def test_an_adapter_from_before_the_cut_is_saved_as_it_is_now(tmp_path: Path) -> None:
    model = apply_rules(llama(), lora(), adapter="a")
    apply_rules(model, DropRule("model.layers.1"), adapter="cut")
    wanted = model(IDS).logits
    save_adapter(model, tmp_path / "a", "a")
    save_adapter(model, tmp_path / "cut", "cut")
    other = llama()
    reports = load_adapters(other, tmp_path)
    assert list(reports) == ["cut", "a"] and active(other) == ("cut", "a")
    assert torch.equal(other(IDS).logits, wanted)
    assert list(adapters(other)) == ["cut", "a"]


def test_a_later_change_of_the_structure_is_refused(tmp_path: Path) -> None:
    model = apply_rules(llama(), [lora(), DropRule("model.layers.1")], adapter="a")
    apply_rules(model, DropRule("model.layers.0"), adapter="again")
    with pytest.raises(SurgeryError, match=r"DropRule \[again\] changed the structure after it.*") as error:
        save_adapter(model, tmp_path, "a")
    assert "save_surgery" in str(error.value) and not list(tmp_path.iterdir())


def test_pefts_format_can_not_hold_a_structure(tmp_path: Path) -> None:
    model = apply_rules(llama(), [lora(), DropRule("model.layers.1")])
    with pytest.raises(SurgeryError, match="DropRule"):
        save_adapter(model, tmp_path, format="peft")
    assert not list(tmp_path.iterdir())


def test_rules_that_name_layers_by_number_follow_or_are_refused(tmp_path: Path) -> None:
    model = apply_rules(llama(), lora(layers=[2, 3]), adapter="a")
    apply_rules(model, DropRule("model.layers.0"), adapter="cut")
    with pytest.raises(SurgeryError, match="modules of the model have moved"):
        save_adapter(model, tmp_path, "a")


def test_lists_without_a_configuration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    state = base.state_dict()
    model = apply_rules(base, [DropRule("1"), LoraRule(nn.Linear, rank=2, init="random")])
    x = torch.ones(1, 4)
    wanted = model(x)
    save_adapter(model, tmp_path)
    other = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    other.load_state_dict(state)
    load_adapter(other, tmp_path)
    assert torch.equal(other(x), wanted)
