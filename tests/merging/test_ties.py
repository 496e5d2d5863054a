"""Tied heads that a merge unties: config, tied keys, files and the merged output agree; unmerging ties them again."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from surgery import MergeError, PlanError, apply_rules, forget, merge, merge_to, remove, unmerge
from surgery.rules import LoraRule

IDS = torch.tensor([[1, 2, 3, 4]])


def llama() -> Any:
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, tie_word_embeddings=True, **sizes))  # type: ignore[arg-type]


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))


def bert() -> Any:
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1)
    return BertForMaskedLM(BertConfig(vocab_size=32, **sizes))  # type: ignore[arg-type]


def t5() -> Any:
    sizes = dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(T5Config(vocab_size=32, **sizes))  # type: ignore[arg-type]


MODELS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "llama": (llama, ("lm_head", "embed_tokens")),
    "gpt2": (gpt2, ("lm_head", "wte")),
    "bert": (bert, ("decoder", "word_embeddings")),
    "t5": (t5, ("lm_head", "encoder.embed_tokens", "shared")),
}
CASES = [(name, target) for name, (_, targets) in MODELS.items() for target in targets]


def build_model(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    assert model.config.tie_word_embeddings
    return model


def compute_logits(model: Any) -> Tensor:
    options = {"decoder_input_ids": IDS} if isinstance(model, T5ForConditionalGeneration) else {}
    with torch.no_grad():
        return model(IDS, **options).logits


def tie_state(model: Any) -> list[Any]:
    """The settings that declare tied weights, and the weights that are tied."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    settings = [
        (part.config.tie_word_embeddings, part._tied_weights_keys, part.all_tied_weights_keys) for part in parts
    ]
    return [copy.deepcopy(settings), [sorted(k for k in vars(part) if "tied" in k) for part in parts], list_ties(model)]


def list_ties(model: Any) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("name, target", CASES)
def test_merged_tied_weights_stay_merged(name: str, target: str, tmp_path: Path) -> None:
    model = apply_rules(build_model(name), LoraRule(target, rank=2, init="random"))
    before, live, kind = tie_state(model), compute_logits(model), type(model)
    merge(model, untie=True)
    merged = compute_logits(model)
    assert torch.allclose(merged, live, atol=1e-4)  # ΔW is rounded into float32 once
    assert not model.config.tie_word_embeddings
    assert not any(part._tied_weights_keys for part in model.modules() if isinstance(part, PreTrainedModel))
    assert not model.all_tied_weights_keys
    model.tie_weights()
    assert torch.equal(compute_logits(model), merged)
    assert torch.equal(compute_logits(copy.deepcopy(model)), merged)
    model.save_pretrained(tmp_path / "saved")
    loaded = kind.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(compute_logits(loaded), merged)
    if name != "t5":  # its config says "tied" whatever the file contains
        assert not loaded.config.tie_word_embeddings
        loaded.tie_weights()
        assert torch.equal(compute_logits(loaded), merged)
    unmerge(model)
    assert tie_state(model) == before and torch.equal(compute_logits(model), live)
    model.tie_weights()
    assert torch.equal(compute_logits(model), live)
    remove(model)
    assert torch.equal(compute_logits(model), compute_logits(build_model(name)))


@pytest.mark.parametrize("name, target", CASES)
def test_a_checkpoint_of_a_tied_model(name: str, target: str, tmp_path: Path) -> None:
    model = apply_rules(build_model(name), LoraRule(target, rank=2, init="random"))
    before = tie_state(model)
    with pytest.raises((MergeError, PlanError), match="merge_to\\(…, untie=True\\)"):
        merge_to(model, tmp_path / "merged")
    assert tie_state(model) == before
    merge_to(model, tmp_path / "merged", untie=True)
    assert tie_state(model) == before
    merge(model, untie=True)
    merged = compute_logits(model)
    unmerge(model)
    assert torch.equal(compute_logits(type(model).from_pretrained(tmp_path / "merged").eval()), merged)


@pytest.mark.parametrize("name", MODELS)
def test_a_final_merge_stays_untied(name: str, tmp_path: Path) -> None:
    model = apply_rules(build_model(name), LoraRule(MODELS[name][1][0], rank=2, init="random"))
    merge(model, untie=True)
    merged = compute_logits(model)
    forget(model)
    model.tie_weights()
    assert torch.equal(compute_logits(model), merged) and all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(compute_logits(type(model).from_pretrained(tmp_path / "saved").eval()), merged)


def test_a_merge_that_fails_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    merging = importlib.import_module("surgery.merging.merge")
    ties = importlib.import_module("surgery.state.tied_weights")
    model = apply_rules(build_model("llama"), LoraRule(["lm_head", "q_proj"], rank=2, init="random"))
    before, live = tie_state(model), compute_logits(model)

    def broken(*args: Any) -> Any:
        ties.say_untied(*args)
        raise RuntimeError("no")

    monkeypatch.setattr(merging, "say_untied", broken)
    with pytest.raises(RuntimeError):
        merge(model, untie=True)
    assert tie_state(model) == before and torch.equal(compute_logits(model), live)


def test_what_is_not_tied_is_left_as_it_is() -> None:
    model = apply_rules(build_model("llama"), LoraRule("q_proj", rank=2, init="random"))
    before = tie_state(model)
    merge(model, untie=True)
    assert tie_state(model) == before and model.config.tie_word_embeddings
