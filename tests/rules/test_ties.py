"""TieRule and UntieRule against models of transformers that are built so, and against plain torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    PlanError,
    RuleError,
    SurgeryError,
    adapter_state_dict,
    apply_rules,
    commit,
    load_adapter,
    merge,
    plan_rules,
    remove,
    rules_from_json,
    rules_to_json,
    save_adapter,
)
from surgery.rules import LoraRule, ResizeVocabRule, TieRule, UntieRule
from surgery.testing import Snapshot
from tests.support.built_models import SEQ2SEQ, SIZES, TEXT, build_model, logits_of
from tests.support.families import FAMILIES

transformers = pytest.importorskip("transformers")
IDS = torch.arange(6)[None] + 6
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
TIED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**TEXT, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "bos_token_id": 1,
                                 "eos_token_id": 1}),
    "bert, with a bias": ("BertForMaskedLM", TEXT),
    "opt": ("OPTForCausalLM", {**SIZES, "ffn_dim": 16, "vocab_size": 40, "word_embed_proj_dim": 16}),
    "gemma": ("Gemma2ForCausalLM", {**TEXT, "head_dim": 8, "num_key_value_heads": 1}),
    "t5": ("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}),
    "umt5, which computes by the flag": ("UMT5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}),
    "marian": ("MarianMTModel", SEQ2SEQ),
}  # fmt: skip
OTHER_TIES = ("t5", "umt5, which computes by the flag", "marian")  # of encoder and decoder


def build(name: str, **fields: Any) -> Any:
    kind, own = TIED[name]
    return build_model(kind, {**own, **fields})


def call(model: Any) -> Tensor:
    return logits_of(model, IDS)


def train(model: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    call(model).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", TIED)
def test_an_untied_head_trains_stays_and_is_saved(name: str, tmp_path: Path) -> None:
    model = build(name)
    before, config, embedding = Snapshot(model), model.config, model.get_input_embeddings().weight.detach().clone()
    rules = [UntieRule(trainable=True)]
    assert rules_from_json(rules_to_json(rules)) == rules
    assert plan_rules(model, rules) and not before.differences(model)
    apply_rules(model, rules)
    train(model)
    expected, head = call(model), model.get_output_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, embedding) and not torch.equal(head, embedding)
    for recompute in (True, False):
        model.tie_weights(recompute_mapping=recompute)
        assert torch.equal(call(model), expected)
    assert model.config.tie_word_embeddings is (name in OTHER_TIES)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(fresh := build(name), tmp_path / "adapter")
    assert torch.equal(call(fresh), expected)
    commit(final := copy.deepcopy(model))
    final.save_pretrained(tmp_path / "plain")
    loaded = type(final).from_pretrained(tmp_path / "plain").eval()
    assert torch.allclose(call(loaded), expected, atol=1e-5)  # without gradients torch multiplies in another order
    remove(model)
    assert not before.differences(model) and model.config is config


def test_ties_that_a_part_declares_while_it_is_built_stay(tmp_path: Path) -> None:
    """Zamba's class says in `__init__` which layers share their weights, under the flag that ties the head."""
    torch.manual_seed(0)
    model: Any = FAMILIES["zamba"].make().eval()
    apply_rules(model, UntieRule(), freeze=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    commit(model).save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.model.layers[4].shared_transf is not loaded.model.layers[2].shared_transf
    first, second = (dict(loaded.model.layers[index].shared_transf.named_parameters()) for index in (2, 4))
    assert all(parameter is second[name] for name, parameter in first.items())


@pytest.mark.parametrize("name", sorted({*TIED} - {*OTHER_TIES}))
def test_untied_it_is_the_model_that_is_built_untied(name: str) -> None:
    model, plain = build(name), build(name, tie_word_embeddings=False)
    apply_rules(model, UntieRule(), freeze=False)
    plain.load_state_dict(model.state_dict())
    for _ in range(2):
        assert torch.equal(call(model), call(plain))
        train(model)
        train(plain)
    assert torch.equal(call(model), call(plain))
    assert model.config.to_dict() == plain.config.to_dict()


@pytest.mark.parametrize("name", ["llama", "gemma", "opt"])
def test_tied_it_is_the_model_that_is_built_tied(name: str, tmp_path: Path) -> None:
    model, plain = build(name, tie_word_embeddings=False), build(name, tie_word_embeddings=True)
    before, head = Snapshot(model), model.get_output_embeddings().weight
    apply_rules(model, TieRule(), freeze=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    plain.load_state_dict(model.state_dict())
    for _ in range(2):
        train(model)
        train(plain)
    assert torch.equal(call(model), call(plain)) and model.config.to_dict() == plain.config.to_dict()
    assert not adapter_state_dict(model)
    expected = call(model)
    commit(final := copy.deepcopy(model))
    final.save_pretrained(tmp_path)
    loaded = type(final).from_pretrained(tmp_path).eval()
    assert torch.equal(call(loaded), expected)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    trained = model.get_input_embeddings().weight.detach().clone()
    remove(model)
    assert model.get_output_embeddings().weight is head and torch.equal(model.get_input_embeddings().weight, trained)
    assert not [line for line in before.differences(model) if "requires_grad" in line]


@pytest.mark.parametrize("name", ["llama", "bert, with a bias", "t5"])
def test_one_after_the_other_and_back(name: str) -> None:
    model = build(name)
    before = Snapshot(model)
    apply_rules(model, UntieRule(), adapter="a")
    apply_rules(model, TieRule(), adapter="b")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with pytest.raises(SurgeryError, match="remove 'b' first"):
        remove(model, "a")
    remove(model, "b")
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    remove(model)
    assert not before.differences(model)


@pytest.mark.parametrize("first", ["untie", "resize"])
def test_beside_another_vocabulary(first: str, tmp_path: Path) -> None:
    rules = [UntieRule(), ResizeVocabRule(tokens=45)]
    model = build("llama")
    before = Snapshot(model)
    apply_rules(model, rules if first == "untie" else rules[::-1], freeze=False)
    train(model)
    shapes = sorted(tuple(t.shape) for t in adapter_state_dict(model).values())
    assert shapes == ([(5, 16), (5, 16), (40, 16)] if first == "untie" else [(5, 16), (45, 16)])
    rows = [model.get_input_embeddings().weight[:40].clone(), model.get_output_embeddings().weight.clone()]
    save_adapter(model, tmp_path)
    remove(model)
    assert torch.equal(model.get_input_embeddings().weight, rows[0])
    load_adapter(model, tmp_path)
    assert torch.equal(model.get_output_embeddings().weight, rows[1])
    remove(model)
    assert not [line for line in before.differences(model) if "requires_grad" in line]


def test_in_half_precision_and_on_the_meta_device() -> None:
    model = apply_rules(build("llama").bfloat16(), UntieRule())
    assert model.lm_head.weight.dtype == torch.bfloat16
    with torch.device("meta"):
        model = build("llama")
    assert plan_rules(model, UntieRule(trainable=True)).trainable == 640


def test_adapters_on_the_head() -> None:
    model = apply_rules(build("llama"), LoraRule("lm_head", rank=2, init="random"), adapter="lora")
    before = call(model)
    apply_rules(model, UntieRule(), adapter="own")
    assert torch.allclose(call(model), before, atol=1e-6)
    merge(model, "lora")  # tied, it would have needed untie=True
    with pytest.raises(SurgeryError, match="merged"):
        remove(model, "own")
    model = apply_rules(build("llama", tie_word_embeddings=False), LoraRule("lm_head", rank=2, init="pissa"))
    with pytest.raises(PlanError, match="'default' changed it"):
        apply_rules(model, TieRule(), adapter="tie")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_any_two_parameters() -> None:
    model, x = Pair(), torch.randn(2, 4)
    before, expected = Snapshot(model), model(x)
    apply_rules(model, TieRule("two", to="one.bias", parameter="bias"))
    assert model.two.bias is model.one.bias and model.two.weight is not model.one.weight
    remove(model)
    assert not before.differences(model) and torch.equal(model(x), expected)
    model.two.weight = model.one.weight
    before = Snapshot(model)
    apply_rules(model, UntieRule("two", trainable=True))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["two.weight"]
    remove(model)
    assert not before.differences(model) and model.two.weight is model.one.weight


def test_what_is_wrong_is_told() -> None:
    for make in (lambda: TieRule("x", to=""), lambda: TieRule("x", parameter="a.b"), lambda: UntieRule(parameter="")):
        with pytest.raises(RuleError):
            make()
    wrong: list[tuple[Any, Any, str]] = [
        (Pair(), TieRule("two", to="one.nothing"), "there is no parameter one.nothing"),
        (Pair(), TieRule("two", to="one.bias"), "can't be one parameter"),
        (Pair(), UntieRule("two"), "not shared"),
        (Pair(), UntieRule(), "does not say which module is its head"),
        (build("llama"), TieRule(), "one parameter already"),
    ]
    for model, rule, text in wrong:
        plan = plan_rules(model, rule)
        assert text in str(plan.problems[0]), str(plan.problems[0])


def test_a_configuration_that_does_not_take_the_tie_is_refused() -> None:
    torch.manual_seed(0)
    model = FAMILIES["dbrx"].make()
    before = Snapshot(model)
    with pytest.raises(PlanError, match="DbrxConfig does not take tie_word_embeddings=True"):
        apply_rules(model, TieRule())
    assert not before.differences(model)
