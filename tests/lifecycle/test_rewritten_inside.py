"""Verbs called with a module around the rewritten model, or with a part of it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import PlanError, SurgeryError, apply_rules, merge, remove, save_adapter, summary, unmerge
from surgery.rules import LoraRule


def body() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))


def compiled(inner: nn.Module) -> Any:
    return torch.compile(inner, backend="eager")


AROUND: dict[str, Callable[[nn.Module], Any]] = {
    "module": Around,
    "two": lambda inner: Around(nn.Sequential(inner)),
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "compiled DataParallel": lambda inner: compiled(nn.DataParallel(inner)),
}


def make_rewritten() -> nn.Sequential:
    model = apply_rules(body(), LoraRule(["0", "2"], rank=2, init="random"), adapter="a")
    return apply_rules(model, LoraRule("0", rank=4, init="random"), adapter="b")


@pytest.mark.parametrize("kind", AROUND)
def test_verbs_find_the_model_inside(kind: str) -> None:
    model, x = make_rewritten(), torch.randn(3, 8)
    outer, twin = AROUND[kind](model), copy.deepcopy(model)
    assert surgery.active(outer) == ("a", "b")
    for names in ("a", ["b"], ["a", "b"]):
        assert surgery.activate(outer, names) is outer
        surgery.activate(twin, names)
        assert torch.equal(model(x), twin(x))
    assert surgery.deactivate(outer) is outer and torch.equal(model(x), body()(x))
    surgery.activate(outer)
    assert torch.equal(model(x), twin(x))
    with surgery.using(outer, None):
        assert torch.equal(model(x), body()(x))
    with surgery.route(outer, ["a", None, "b"]), surgery.route(twin, ["a", None, "b"]):
        assert torch.equal(model(x), twin(x))
    assert surgery.adapters(outer) == surgery.adapters(model)
    assert surgery.rules_of(outer) == surgery.rules_of(model)
    assert list(surgery.adapter_state_dict(outer, "a")) == list(surgery.adapter_state_dict(model, "a"))
    assert summary(outer).rows == summary(model).rows and summary(outer).added == summary(model).added
    assert surgery.show(outer, "0") == surgery.show(model, "0")
    assert not any("adapters" in key for key in surgery.base_state_dict(outer))
    assert merge(outer).sites == 2 and type(model[0]) is nn.Linear
    assert unmerge(outer) is outer and torch.equal(model(x), twin(x))
    folder = save_adapter(outer, tempfile.mkdtemp(), "a")
    assert (folder / "adapter_model.safetensors").read_bytes() == (
        save_adapter(twin, tempfile.mkdtemp(), "a") / "adapter_model.safetensors"
    ).read_bytes()
    assert surgery.hotswap(outer, "a", folder)
    surgery.pad_rank(outer, "a", 6)
    surgery.copy_adapter(outer, "a", "c")
    surgery.rename_adapter(outer, "c", "d")
    surgery.combine(outer, {"a": 1.0, "b": 0.5}, into="e", method="cat")
    assert list(surgery.adapters(model)) == ["a", "b", "d", "e"]
    assert remove(outer, "e") is outer
    merge(outer, ["a", "b"])
    assert surgery.forget(outer) is outer
    remove(outer)
    assert not surgery.rules_of(model) and not any("adapters" in key for key in model.state_dict())


@pytest.mark.parametrize("kind", ["compile", "DataParallel", "compiled DataParallel"])
def test_what_only_wraps_takes_rules_for_what_is_inside(kind: str) -> None:
    model = body()
    outer = AROUND[kind](model)
    assert surgery.plan_rules(outer, LoraRule("0", rank=2)).steps[0].path == "0"
    assert apply_rules(outer, LoraRule("0", rank=2)) is outer
    assert surgery.explain(outer, LoraRule("0"), "0")
    folder = save_adapter(outer, tempfile.mkdtemp())
    assert list(surgery.adapter_state_dict(model)) == ["0.adapters.A", "0.adapters.B"]
    assert surgery.load_adapter(outer, folder, "again")
    apply_rules(outer, LoraRule("2", rank=2), adapter="more")
    assert list(surgery.adapters(model)) == ["default", "again", "more"]
    with pytest.raises(SurgeryError, match="no adapter 'nonsense'"):
        remove(outer, "nonsense")


def test_rules_for_what_is_around_a_rewritten_model_are_refused_by_its_name() -> None:
    outer = Around(make_rewritten())
    with pytest.raises(PlanError, match="part of this model has rules of its own") as caught:
        apply_rules(outer, LoraRule("out", rank=2), adapter="c")
    assert "where: inner" in str(caught.value)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = make_rewritten(), apply_rules(body(), LoraRule("0", rank=2, init="random"))

    def forward(self, x: Tensor) -> Tensor:
        return self.text(x) + self.image(x)


VERBS: dict[str, Callable[[Any], Any]] = {
    "activate": lambda m: surgery.activate(m, "a"),
    "deactivate": surgery.deactivate,
    "merge": merge,
    "unmerge": unmerge,
    "remove": remove,
    "save": lambda m: save_adapter(m, tempfile.mkdtemp(), "a"),
    "adapters": surgery.adapters,
    "rules_of": surgery.rules_of,
    "adapter_state_dict": lambda m: surgery.adapter_state_dict(m, "a"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_several_rewritten_parts_are_named(verb: str) -> None:
    model = Two()
    with pytest.raises(SurgeryError, match="2 parts of this Two were rewritten") as caught:
        VERBS[verb](model)
    assert "where: text, image" in str(caught.value) and "model.text" in str(caught.value)


def test_a_summary_counts_all_parts() -> None:
    rows = summary(Two()).rows
    assert [row[0] for row in rows] == ["text: a", "text: b", "image: default"]
    assert summary(Two()).added == sum(row[3] for row in rows)


@pytest.mark.parametrize("verb", VERBS)
def test_a_part_of_a_rewritten_model_is_told_so(verb: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8))
    apply_rules(model, LoraRule("0.0", rank=2), adapter="a")
    with pytest.raises(SurgeryError, match="a part of a rewritten model") as caught:
        VERBS[verb](model[0])
    assert "in which this is '0'" in str(caught.value)
    with pytest.raises(SurgeryError, match="a part of a rewritten model"):
        apply_rules(model[0], LoraRule("0", rank=2))
    assert summary(model[0]).rows[0][:4] == ("a", "LoraRule", 1, 32) and summary(model[0]).added == 32


def test_a_part_that_was_rewritten_by_itself_keeps_its_own_record() -> None:
    outer, x = Around(body()), torch.randn(2, 8)
    base = outer(x)
    apply_rules(outer, LoraRule("out", rank=2, init="random"))
    apply_rules(outer.inner, LoraRule("0", rank=2, init="random"))
    both = outer(x)
    assert [(row[0], row[3]) for row in summary(outer).rows] == [("default", 20), ("inner: default", 32)]
    assert list(surgery.adapter_state_dict(outer)) == ["out.adapters.A", "out.adapters.B"]
    merge(outer)
    assert torch.allclose(outer(x), both, atol=1e-6) and "_surgery_recipe" in vars(type(outer.inner[0]))  # type: ignore[index]
    unmerge(outer)
    remove(outer)
    assert summary(outer.inner).rows[0][2] == 1
    remove(outer.inner)
    assert torch.equal(outer(x), base)


def test_an_untouched_model_has_nothing_inside() -> None:
    outer = compiled(body())
    assert surgery.rules_of(outer) == [] and summary(outer).rows == ()
    assert surgery.adapters(outer) == {} and surgery.active(outer) == ()
    with pytest.raises(SurgeryError, match="no rules were applied"):
        remove(outer)


def test_no_folder_is_left_behind(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError):
        save_adapter(Two(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
