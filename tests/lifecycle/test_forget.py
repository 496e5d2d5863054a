"""`forget` makes a merge final: a plain model with other weights and without a trace of an adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from surgery import (
    MergeError,
    SurgeryError,
    activate,
    adapters,
    apply_rules,
    base_state_dict,
    forget,
    merge,
    remove,
    unmerge,
)
from surgery.rules import IA3Rule, LoraRule, TrainRule
from surgery.testing import Snapshot

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    model[0].bias.requires_grad_(False)
    return model


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def make_adapted(*names: str, init: str = "random") -> nn.Sequential:
    model = model_of()
    for name in names:
        apply_rules(model, LoraRule(["0", "2"], rank=2, init=init), adapter=name)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_weights_are_the_sums_by_plain_arithmetic(dtype: torch.dtype) -> None:
    model = model_of().to(dtype)
    apply_rules(model, [LoraRule("0", rank=2, alpha=6, init="random")])
    adapter: Any = model[0].adapters.default  # type: ignore[union-attr]
    expected = (model[0].weight.double() + 3 * adapter.B.double() @ adapter.A.double()).to(dtype)  # type: ignore[union-attr]
    weight = model[0].weight
    merge(model)
    assert forget(model) is model and model[0].weight is weight
    torch.testing.assert_close(model[0].weight, expected, atol=1e-6 if dtype != torch.bfloat16 else 1e-2, rtol=1e-2)
    model_of().to(dtype).load_state_dict(model.state_dict(), strict=True)
    assert type(model[0]) is nn.Linear and not vars(model).get("_surgery_model")
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


def test_every_kind_of_change() -> None:
    model = model_of()
    apply_rules(model, [LoraRule("0", rank=2, init="random"), IA3Rule("0", init="random"), TrainRule("2")])
    with torch.no_grad():
        adapter: Any = model[2].adapters.default  # type: ignore[union-attr]
        adapter.weight.mul_(2)
    expected = model(X)
    merge(model)
    forget(model)
    torch.testing.assert_close(model(X), expected, **CLOSE)
    apply_rules(model, LoraRule("0", rank=2))  # the old name is free
    torch.testing.assert_close(model(X), expected, **CLOSE)


def test_what_is_not_merged_stays() -> None:
    model = make_adapted("a", "b", "c")
    activate(model, ["a", "b"])
    expected = model(X)
    merge(model, "a")
    forget(model)
    assert {name: adapter.live for name, adapter in adapters(model).items()} == {"b": True, "c": False}
    torch.testing.assert_close(model(X), expected, **CLOSE)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"{site}.adapters.b.{name}" for site in "02" for name in "AB"
    ]
    apply_rules(model, LoraRule("0", rank=2), adapter="a")
    activate(model, ["b", "a"])
    torch.testing.assert_close(model(X), expected, **CLOSE)
    remove(model)
    assert type(model[0]) is nn.Linear and list(model.state_dict()) == list(model_of().state_dict())
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


def test_a_start_that_changed_the_base() -> None:
    model = make_adapted("p", init="pissa")
    expected = model(X)
    merge(model)
    forget(model)
    torch.testing.assert_close(model(X), expected, **CLOSE)
    stacked = make_adapted("p", init="pissa")
    apply_rules(stacked, LoraRule("0", rank=2, init="random"), adapter="a")
    merge(stacked, "a")
    before = Snapshot(stacked)
    with pytest.raises(MergeError, match=r"LoraRule \[p\], which stays, changed a weight"):
        forget(stacked)
    assert before.differences(stacked) == []
    unmerge(stacked)
    merge(stacked)
    forget(stacked)
    assert type(stacked[0]) is nn.Linear


def test_refusals() -> None:
    with pytest.raises(SurgeryError, match="no rules were applied"):
        forget(model_of())
    model = make_adapted("a")
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match="nothing is merged"):
        forget(model)
    assert before.differences(model) == []


def test_a_tied_head_stays_untied(tmp_path: Any) -> None:
    tiny: Any = pytest.importorskip("tests.support.tiny")
    model, example = tiny.gpt2()
    model.eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    apply_rules(model, LoraRule("lm_head", rank=2, init="random"), adapter="a")
    apply_rules(model, LoraRule("c_attn", rank=2, init="random"), adapter="b")
    expected = model(**example).logits
    merge(model, "a", untie=True)
    forget(model)
    torch.testing.assert_close(model(**example).logits, expected, **CLOSE)
    assert not model.config.tie_word_embeddings
    remove(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**example).logits, model(**example).logits)
    assert base_state_dict(loaded).keys() == model.state_dict().keys()


@pytest.mark.parametrize("places", [["embed"], ["head"], ["embed", "head"]])
@pytest.mark.parametrize("trained", [True, False])
def test_untied_weights_get_the_flag_of_the_one_they_were(places: list[str], trained: bool) -> None:
    model: Any = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model.head.weight = model.embed.weight.requires_grad_(trained)
    apply_rules(model, LoraRule(places, rank=2, init="random"), adapter="a")
    apply_rules(model, LoraRule(places, rank=2, init="random"), adapter="b")
    merge(model, "a", untie=True)
    forget(model)
    assert model.head.weight is not model.embed.weight
    assert not model.head.weight.requires_grad and not model.embed.weight.requires_grad
    remove(model)
    assert model.head.weight.requires_grad == model.embed.weight.requires_grad == trained
