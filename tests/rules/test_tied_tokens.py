"""Rows of an embedding and of the head that is tied to it share one delta, as in PEFT, also after training."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery import (
    LoadError,
    PlanError,
    SurgeryError,
    activate,
    apply_rules,
    combine,
    copy_adapter,
    hotswap,
    load_adapter,
    merge,
    plan_rules,
    remove,
    save_adapter,
    summary,
    unmerge,
)
from surgery.peft_format.methods import rules_by
from surgery.rules import LoraRule, TokensRule
from surgery.testing import Snapshot
from tests.support.conformance import of_transformers
from tests.support.peers import peft

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]  # PEFT's own words
IDS = torch.tensor([[3, 5, 7, 1, 9]])


def build(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return of_transformers(name, num_hidden_layers=1, **more).eval()


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "decoder_start_token_id": 0}
MODELS: dict[str, tuple[Callable[[], Any], str, str, str]] = {  # and the layer adapted, the embedding, the head
    "tied": (lambda: build("LlamaForCausalLM", tie_word_embeddings=True), "q_proj", "embed_tokens", "lm_head"),
    "untied": (lambda: build("LlamaForCausalLM"), "q_proj", "embed_tokens", "lm_head"),
    "GPT-2": (lambda: build("GPT2LMHeadModel"), "c_attn", "wte", "lm_head"),
    "BERT": (lambda: build("BertForMaskedLM"), "query", "word_embeddings", "cls.predictions.decoder"),
    "T5": (lambda: build("T5ForConditionalGeneration", **T5), "q", "shared", "lm_head"),
}  # fmt: skip
TOKENS: dict[str, Callable[[str, str], Any]] = {
    "a list": lambda embedding, head: [5, 3],
    "the embedding": lambda embedding, head: {embedding: [5, 3]},
    "the head alone": lambda embedding, head: {head: [5, 3]},
    "both": lambda embedding, head: {embedding: [5, 3], head: [5, 3]},
    "both, other tokens": lambda embedding, head: {embedding: [5, 3], head: [1, 7]},
}


def loss(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).logits


def train(model: Any, steps: int = 3) -> Any:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", MODELS)
def test_trains_as_in_peft(name: str, tokens: str, tmp_path: Path) -> None:
    build, layer, embedding, head = MODELS[name]
    fields: dict[str, Any] = {"r": 2, "target_modules": [layer], "init_lora_weights": False}
    fields["trainable_token_indices"] = TOKENS[tokens](embedding, head)
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**copy.deepcopy(fields))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = build()
    load_adapter(model, tmp_path / "theirs")
    activate(model, train=True)
    count = sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    assert summary(model).trainable == count
    assert torch.allclose(logits(train(model)), logits(train(theirs)), atol=1e-5)
    expected = logits(model)
    save_adapter(model, tmp_path / "ours", format="peft")
    save_adapter(model, tmp_path / "own", format="surgery")
    assert torch.allclose(
        logits(peft.PeftModel.from_pretrained(build(), str(tmp_path / "ours")).eval()), expected, atol=1e-5
    )
    for folder in ("ours", "own"):
        load_adapter(again := build(), tmp_path / folder)
        assert torch.equal(logits(again), expected)


def tied() -> tuple[Any, nn.Module, nn.Module]:
    model = MODELS["tied"][0]()
    apply_rules(model, [LoraRule("q_proj", rank=2), TokensRule(["embed_tokens", "lm_head"], tokens=[5, 3])])
    return model, model.model.embed_tokens, model.lm_head


def rows(module: Any, adapter: str = "default") -> nn.Parameter:
    return module.adapters.get_submodule(adapter).rows


def shared(model: Any, adapter: str = "default") -> bool:
    return rows(model.model.embed_tokens, adapter) is rows(model.lm_head, adapter)


def test_one_rule_on_tied_modules_has_one_delta() -> None:
    plan = plan_rules(MODELS["tied"][0](), [TokensRule(["embed_tokens", "lm_head"], tokens=[5, 3])])
    assert plan.trainable == 64
    model, embedding, _ = tied()
    assert shared(train(model)) and not torch.equal(rows(embedding), embedding.weight[[3, 5]])  # type: ignore[index]
    untied = apply_rules(MODELS["untied"][0](), [TokensRule(["embed_tokens", "lm_head"], tokens=[5, 3])])
    assert not shared(untied)


def test_it_stays_one_through_the_verbs(tmp_path: Path) -> None:
    model, *_ = tied()
    train(model)
    assert shared(copy.deepcopy(model)) and shared(pickle.loads(pickle.dumps(model)))  # noqa: S301
    before = logits(model)
    copy_adapter(model, "default", "twin")
    assert shared(model, "twin") and rows(model.lm_head, "twin") is not rows(model.lm_head)
    combine(model, {"default": 0.5, "twin": 0.5}, into="both")
    assert shared(model, "both")
    activate(model, "both")
    assert torch.allclose(logits(model), before, atol=1e-5)
    hotswap(model, "both", save_adapter(model, tmp_path, "default"))
    assert shared(model, "both") and torch.equal(logits(model), before)
    snapshot = Snapshot(model)
    merge(model, untie=True)
    assert torch.allclose(logits(model), before, atol=1e-5)
    unmerge(model)
    assert not snapshot.differences(model) and torch.equal(logits(model), before)
    plain = MODELS["tied"][0]()
    assert torch.equal(logits(remove(model)), logits(plain)) and model.lm_head.weight is model.model.embed_tokens.weight


def test_on_a_base_without_numbers(tmp_path: Path) -> None:
    model, *_ = tied()
    folder = save_adapter(train(model), tmp_path, format="surgery")
    with torch.device("meta"):
        empty = MODELS["tied"][0]()
    load_adapter(empty, folder)
    assert shared(empty) and torch.equal(rows(empty.lm_head), rows(model.lm_head))


def test_rows_that_drifted_apart_are_told(tmp_path: Path) -> None:
    """A file with two deltas, written from untied modules, on a model with tied modules."""
    untied = apply_rules(MODELS["untied"][0](), [TokensRule(["embed_tokens", "lm_head"], tokens=[5, 3])])
    save_adapter(untied, tmp_path, format="surgery")
    with pytest.raises(LoadError, match="share one weight"):
        load_adapter(MODELS["tied"][0](), tmp_path, same_base=False)


def test_what_peft_would_train_otherwise_is_not_written_so(tmp_path: Path) -> None:
    for rules in (
        [TokensRule("embed_tokens", tokens=[5])],  # PEFT ties the head to it
        [TokensRule("embed_tokens", tokens=[5]), TokensRule("lm_head", tokens=[5])],  # … and these to each other
    ):
        model = apply_rules(MODELS["tied"][0](), [LoraRule("q_proj", rank=2), *rules])
        with pytest.raises(SurgeryError, match="of tied ones it has one copy"):
            save_adapter(model, tmp_path, format="peft")
        save_adapter(model, tmp_path)
        load_adapter(again := MODELS["tied"][0](), tmp_path)
        assert torch.equal(logits(again), logits(model))
    head = apply_rules(MODELS["tied"][0](), [LoraRule("q_proj", rank=2), TokensRule("lm_head", tokens=[5])])
    save_adapter(head, tmp_path / "head", format="peft")
    message = json.loads((tmp_path / "head/adapter_config.json").read_text())
    assert message["trainable_token_indices"] == {"lm_head": [5]}


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_fields_that_peft_refuses_together(name: str) -> None:
    build, layer, embedding, head = MODELS[name]
    fields: dict[str, Any] = {"peft_type": "LORA", "r": 2, "target_modules": [layer]}
    inputs = {embedding: [1], head: [2]}
    config = {**fields, "trainable_token_indices": inputs, "ensure_weight_tying": True}
    if name == "tied":
        with pytest.raises(PlanError, match="when different token indices are specified"):
            rules_by(build(), config)
    else:
        assert len(rules_by(build(), config)) == 3
    with pytest.raises(PlanError, match="Target modules {'nope'} not found"):
        rules_by(build(), {**fields, "trainable_token_indices": {"nope": [1]}})
    assert len(rules_by(build(), {**fields, "trainable_token_indices": [1], "ensure_weight_tying": True})) == 2
