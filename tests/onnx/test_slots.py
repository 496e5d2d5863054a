"""Slots of all kinds except LoRA, and rules that can't be slots, against the live model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from surgery import Rule, Site, SurgeryError, activate, adapter_state_dict, apply_rules, load_adapter, rule, using
from surgery.onnx.checking.adapter_transfer import export_adapter, import_adapter
from surgery.rewritten_model.state_dict import load_adapter_state_dict
from surgery.rules import (
    BiasRule,
    BottleneckRule,
    IA3Rule,
    LoraRule,
    NormRule,
    ReftRule,
    ReplaceRule,
    RoadRule,
    SteerRule,
    TokensRule,
    TrainRule,
)
from tests.support.slots import Exported, adapted, check_slots, outputs, plain, same


class Text(nn.Module):
    """A text model of one block, with modules for all kinds of rules."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.up, self.act, self.down = nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)
        self.conv, self.batch = nn.Conv1d(8, 8, 3, padding=1, groups=2), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.word(ids)
        x = x + self.down(self.act(self.up(self.norm(x))))
        x = x + self.batch(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(x)


def text() -> nn.Module:
    model = Text()
    model.batch.running_mean.normal_()  # type: ignore[union-attr]
    model.batch.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.eval()


def ids(batch: int, length: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, 20, (batch, length))}


def test_one_file_for_adapters_of_many_kinds(tmp_path: Path) -> None:
    """Two rules meet at each module; the order of the file's slots suits all adapters."""
    model = text()
    base = plain(model)
    rules: dict[str, Any] = {
        "scaled": IA3Rule(["up", "down", "conv"], feedforward="down"),
        "both": [IA3Rule(["up", "down"], feedforward=["down"]), LoraRule(["word", "up"], rank=3)],
        "steered": SteerRule(["down"], direction=[0.5] * 8, scale=2.0),
        "ends": SteerRule(["up"], positions="f1+l1", features=12),
        "trained": [TrainRule(["head"]), NormRule()],
        "biases": [LoraRule(["up"], rank=2, dora=True, bias="all")],
        "tokens": TokensRule(["word", "head"], tokens=[3, 7, 11]),
        "bottle": BottleneckRule(["down"], size=5, scale=0.5, activation="gelu"),
        "subspace": ReftRule(["up"], rank=3, positions="f2"),
    }
    exported = Exported(adapted(model, rules), ids(3, 7), tmp_path)
    assert exported.report.notices == []
    slots = {slot["name"]: slot for slot in exported.manifest["slots"]}
    assert slots["norm.adapters.slot.weight"]["rule"] == "train"
    assert slots["down.adapters.slot.up"]["free"] == [1] and slots["down.adapters.slot.up_bias"]["default"] == "zeros"
    ranks = [{slots[f"up.adapters.slot.{key}"]["dim"] for key in keys} for keys in ("AB", "RWb")]
    assert all(len(dims) == 1 for dims in ranks) and ranks[0] != ranks[1]  # sizes of two slots have different names
    marks = exported.nodes()
    assert (
        "NormRule, BiasRule" in marks["norm"] and "SteerRule" in marks["down"] and "Slot" not in "".join(marks.values())
    )
    check_slots(exported, base, [ids(5, 9), ids(2, 1)])
    for name in rules:  # and back into a model, by the slots' rules or equivalent ones
        file = export_adapter(model, name, exported.report.path, tmp_path / f"{name}.onnx_adapter")
        loaded = plain(base)
        load_adapter(loaded, import_adapter(file, exported.report.path))
        with using(model, name):
            same(outputs(loaded, exported.inputs), outputs(model, exported.inputs))
    more: dict[str, Any] = {
        "rows": TokensRule(["word"], tokens=[1, 2, 5, 8, 13]),
        "wide": BottleneckRule(["down"], size=9, activation="gelu"),
        "part": BiasRule(["norm"]),  # of a slot for more than it trains
        "high": ReftRule(["up"], rank=6, positions="f2"),
    }
    other = adapted(plain(base), more)
    for name in more:
        with using(other, name):
            same(exported.run(tensors=exported.tensors(name, other)), outputs(other, exported.inputs))
    unfit: dict[str, Any] = {
        "fed": (IA3Rule(["up"], feedforward="up"), "the slot scales the other side"),
        "where": (SteerRule(["up"], direction=[1.0] * 12), "the slot steers at other positions"),
        "bent": (BottleneckRule(["down"], size=3), "the slot has another activation"),
        "weight": (TrainRule(["up"]), "the slot has no weight"),
        "none": (LoraRule(["conv"], rank=2), "needs slots that the file does not have"),
    }
    for name, (wrong, message) in unfit.items():
        with pytest.raises(SurgeryError, match=message):
            exported.tensors(name, apply_rules(plain(base), wrong, adapter=name))


def test_adapters_that_differ_where_a_slot_has_one_word(tmp_path: Path) -> None:
    """One IA3 scales inputs and one outputs; contradictory orders at a module give no slot."""
    rules: dict[str, Any] = {
        "a": [
            IA3Rule(["down"], feedforward="down"),
            LoraRule(["up", "head"], rank=2),
            RoadRule(["head"], group_size=2),
        ],
        "b": [IA3Rule(["down", "up"])],
        "c": [IA3Rule(["up"]), LoraRule(["up"], rank=2)],
        "d": [LoraRule(["up"], rank=2), IA3Rule(["up"])],
    }
    model = adapted(text(), rules)
    exported = Exported(model, ids(3, 7), tmp_path)
    assert {(site["site"], site["rule"]) for site in exported.manifest["sites"]} == {("head", "lora")}
    assert len(exported.report.notices) == 9 and all("left out" in notice for notice in exported.report.notices)
    notices = " ".join(exported.report.notices)
    assert "IA3Rule of 'c' (1 sites) can't be a slot: the adapters have their rules in contradictory orders" in notices
    assert "IA3Rule of 'a' (1 sites) can't be a slot: in some adapters it scales the module's input" in notices
    with pytest.raises(SurgeryError, match="needs slots that the file does not have") as caught:
        exported.tensors("c")
    assert "IA3Rule at up, LoraRule at up" in str(caught.value)
    with pytest.raises(SurgeryError, match="not every rule can be a slot"):
        Exported(model, ids(3, 7), tmp_path, strict=True)


def test_what_has_no_slot_is_a_constant_of_the_file(tmp_path: Path) -> None:
    """file = base + the live adapters' rules without a slot, before the slots or after them as in the adapter."""
    model = text()
    base = plain(model)
    apply_rules(
        model,
        [
            ReplaceRule(["act"], by="torch.nn.GELU"),
            LoraRule(["up", "head"], rank=3, init="random"),
            RoadRule(["up", "down"], group_size=2, init="random"),
        ],
        adapter="live",
    )
    apply_rules(model, LoraRule(["down"], rank=3, init="random"), adapter="idle")
    activate(model, "live")
    exported = Exported(model, ids(3, 7), tmp_path)
    assert {name: sorted(kinds) for name, kinds in exported.manifest["constants"].items()} == {
        "live": ["replace", "road"]
    }
    assert sorted(notice.partition(" can't")[0] for notice in exported.report.notices) == [
        "ReplaceRule of 'live' (1 sites)",
        "RoadRule of 'live' (2 sites)",
    ]
    more = ids(5, 9)
    adapted = apply_rules(
        plain(base), [ReplaceRule(["act"], by="torch.nn.GELU"), RoadRule(["up", "down"], group_size=2)], adapter="live"
    )
    road = {
        key: t for key, t in adapter_state_dict(model, "live").items() if key.rpartition(".")[2] in ("theta", "alpha")
    }
    load_adapter_state_dict(adapted, road, "live")
    same(exported.run(more), outputs(adapted, more))
    with using(model, "live"):  # LoRA stands before the turn at "up"
        wanted = outputs(model, more)
    assert np.abs(wanted[0] - outputs(adapted, more)[0]).max() > 0.1
    same(exported.run(more, exported.tensors("live")), wanted)
    apply_rules(adapted, [LoraRule(["down"], rank=3, init="random")], adapter="idle")
    load_adapter_state_dict(adapted, adapter_state_dict(model, "idle"), "idle")
    same(exported.run(more, exported.tensors("idle")), outputs(adapted, more))


def test_constants_keep_their_adapters_weight(tmp_path: Path) -> None:
    model = text()
    apply_rules(model, [LoraRule(["head"], rank=3), RoadRule(["up"], group_size=2, init="random")], adapter="a")
    activate(model, "a", 0.25)
    exported = Exported(model, ids(3, 7), tmp_path)
    same(exported.run(), outputs(model, exported.inputs))  # B is zero: LoRA does nothing


@rule("test-plain-slot")
class PlainSlotRule(Rule):
    """A rule that names a rule as its slot which is not a SlotRule."""

    slot_kind = "plain"

    def rewrite(self, site: Site) -> Tensor:
        return site.output + site.param("shift", (site.out_features,))

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> Any:
        return cls()


def test_a_slot_that_is_not_a_slot_rule_is_refused(tmp_path: Path) -> None:
    model = apply_rules(text(), PlainSlotRule("up"))
    with pytest.raises(SurgeryError, match=r"PlainSlotRule.slot returned a PlainSlotRule") as caught:
        Exported(model, ids(2, 3), tmp_path)
    assert "up" in str(caught.value) and "class PlainSlotRule(SlotRule)" in str(caught.value)
