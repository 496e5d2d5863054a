"""Layers dropped, repeated and exchanged: equal to a model that is built so, and undone to the bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from surgery import SurgeryError, apply_rules, plan_rules, remove
from surgery.rules import DropRule, LoraRule, ReorderRule, RepeatRule
from surgery.testing import Snapshot
from tests.support.layers import IDS, llama


def built(model: Any, order: list[int], original: Any) -> Any:
    """A model of the edited configuration, with the weights of the original one under new numbers."""
    plain = type(original)(copy.deepcopy(model.config)).eval()
    weights = {}
    for name, tensor in original.state_dict().items():
        prefix, found, rest = name.partition("layers.")
        if not found:
            weights[name] = tensor
            continue
        number, _, rest = rest.partition(".")
        for position, index in enumerate(order):
            if int(number) == index:
                weights[f"{prefix}layers.{position}.{rest}"] = tensor
    plain.load_state_dict(weights)
    return plain


CASES = {
    "drop": (DropRule(["model.layers.1", "model.layers.2"]), [0, 3]),
    "repeat": (RepeatRule("model.layers", order=[0, 1, 2, 1, 2, 3]), [0, 1, 2, 1, 2, 3]),
    "shared": (RepeatRule("model.layers", times=2, shared=True), [0, 1, 2, 3, 0, 1, 2, 3]),
    "reorder": (ReorderRule("model.layers", order=[2, 0, 3, 1]), [2, 0, 3, 1]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_as_one_that_is_built_so(case: str) -> None:
    rule, order = CASES[case]
    model, original = llama(), llama()
    apply_rules(model, [rule])
    plain = built(model, order, original)
    assert model.config.num_hidden_layers == len(order) == len(model.model.layers)
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        ours, theirs = model(IDS, output_hidden_states=True), plain(IDS, output_hidden_states=True)
    assert torch.equal(ours.logits, theirs.logits)
    assert len(ours.hidden_states) == len(order) + 1
    assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))
    remove(model)
    with torch.no_grad():
        ours, theirs = model(IDS, output_hidden_states=True), original(IDS, output_hidden_states=True)
    assert torch.equal(ours.logits, theirs.logits) and len(ours.hidden_states) == 5
    assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))


@pytest.mark.parametrize("case", CASES)
def test_remove_restores_everything(case: str) -> None:
    model = llama()
    snapshot, config = Snapshot(model), model.config
    apply_rules(model, [CASES[case][0]])
    model(IDS)
    assert config.num_hidden_layers == 4 and model.config is model.model.config is not config
    remove(model)
    assert not snapshot.differences(model)
    assert model.config is config and model.model.config is config and config.num_hidden_layers == 4


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("case", CASES)
def test_generation_with_a_cache_equals_generation_without_one(case: str, cache: str | None) -> None:
    model = apply_rules(llama(), [CASES[case][0]])
    settings: Any = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    more: Any = {"cache_implementation": cache} if cache else {}
    cached = model.generate(IDS, **settings, **more)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **settings))


def test_adapters_before_and_after_stay_with_their_layers() -> None:
    model, original = llama(), llama()
    apply_rules(model, [LoraRule("q_proj", rank=2)], adapter="before")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "before" in name:
                parameter.copy_(torch.randn_like(parameter))
    expected = model(IDS).logits
    apply_rules(model, [DropRule("model.layers.1")], adapter="cut")
    apply_rules(model, [LoraRule("v_proj", rank=2)], adapter="after")
    assert sum("after" in name for name, _ in model.named_parameters()) == 3 * 2
    remove(model, "cut")
    remove(model, "after")
    assert torch.equal(model(IDS).logits, expected)
    remove(model)
    assert torch.equal(model(IDS).logits, original(IDS).logits)


def test_a_copy_and_a_pickle_of_a_cut_model_can_be_restored() -> None:
    model, original = llama(), llama()
    apply_rules(model, [DropRule("model.layers.1")])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        remove(other)
        assert len(other.model.layers) == 4 and other.config.num_hidden_layers == 4
        assert torch.equal(other(IDS).logits, original(IDS).logits)
    assert len(model.model.layers) == 3


def test_another_model_with_the_same_configuration_keeps_it() -> None:
    model = llama()
    twin = type(model)(model.config)
    assert twin.config is model.config
    host = nn.ModuleDict({"a": model, "b": twin})
    apply_rules(host, [DropRule("a.model.layers.0")])
    assert model.config.num_hidden_layers == 3 and twin.config.num_hidden_layers == 4
    assert twin.model.layers[0].self_attn.config is twin.config
    remove(host)
    assert model.config is twin.config


REFUSED = {
    "an index beyond": (RepeatRule("model.layers", order=[0, 9]), "there is no layer 9"),
    "no layer left": (DropRule([f"model.layers.{i}" for i in range(4)]), "no layer would be left"),
    "not a list": (DropRule("model.layers.0.mlp"), "this is not a list of layers"),
    "an order that lacks layers": (ReorderRule("model.layers", order=[1, 0]), "the order leaves layers out"),
    "an unknown target": (DropRule("model.layers.7"), "matches nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_leaves_the_model_as_it_was(case: str) -> None:
    rule, text = REFUSED[case]
    model = llama()
    snapshot, config = Snapshot(model), model.config
    with pytest.raises(SurgeryError, match=text):
        apply_rules(model, [LoraRule("q_proj", rank=2), rule])
    assert not snapshot.differences(model)
    assert model.config is config


def test_fields_of_the_configuration_that_are_set_meanwhile_stay_set() -> None:
    model = llama()
    config = model.config
    apply_rules(model, DropRule("model.layers.1"), adapter="cut")
    model.config.pad_token_id = 3
    apply_rules(model, RepeatRule("model.layers", times=2), adapter="deep")
    model.config.use_cache = False
    remove(copy.deepcopy(model))
    assert config.pad_token_id is None and config.use_cache
    remove(model)
    assert model.config is config and (config.pad_token_id, config.use_cache) == (3, False)
    assert config.num_hidden_layers == 4


def test_planning_touches_nothing() -> None:
    model = llama()
    snapshot = Snapshot(model)
    plan = plan_rules(model, [RepeatRule("model.layers", times=2)])
    assert "4 → 8 layers" in str(plan)
    assert not snapshot.differences(model)
