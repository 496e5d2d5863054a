"""`merge_to` and `save_pretrained` of models with structural rules: what `from_pretrained` of the plain class opens."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from surgery import (
    MergeError,
    PlanError,
    SurgeryError,
    SurgeryWarning,
    active,
    apply_rules,
    commit,
    merge,
    merge_to,
    unmerge,
)
from surgery.rules import (
    DropRule,
    HeadRule,
    LoraRule,
    ReorderRule,
    RepeatRule,
    ReplaceRule,
    ResizeVocabRule,
    TieRule,
    UntieRule,
)
from surgery.testing import Snapshot

IDS = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=50, hidden_size=16, num_attention_heads=4, intermediate_size=16)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **{**sizes, **settings})).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_head=4, n_layer=2, n_positions=16)).eval()


def qwen() -> Any:
    """Its configuration lists the kind of each layer."""
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(num_hidden_layers=4, use_sliding_window=True, sliding_window=3, max_window_layers=2)
    sizes: dict[str, Any] = dict(vocab_size=50, hidden_size=16, num_attention_heads=4, intermediate_size=16)
    return Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **sizes, **settings)).eval()


def t5() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_heads=4)
    return T5ForConditionalGeneration(T5Config(num_layers=2, num_decoder_layers=3, **sizes)).eval()


def swin() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2], num_labels=3
    )
    return SwinForImageClassification(SwinConfig(window_size=4, drop_path_rate=0.0, **sizes)).eval()


def output(model: Any) -> torch.Tensor:
    if isinstance(model, SwinForImageClassification):
        return model(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)).logits
    if isinstance(model, T5ForConditionalGeneration):
        return model(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits
    return model(IDS).logits


CASES: dict[str, tuple[Any, Any, Any]] = {
    "llama drop": (llama, [DropRule("model.layers.1")], AutoModelForCausalLM),
    "llama tied": (lambda: llama(tie_word_embeddings=True), [DropRule("model.layers.0")], AutoModelForCausalLM),
    "llama shared": (llama, [RepeatRule("model.layers", times=2, shared=True)], AutoModelForCausalLM),
    "gpt2 repeat": (gpt2, [RepeatRule("transformer.h", order=[0, 1, 1])], AutoModelForCausalLM),
    "qwen reorder": (qwen, [ReorderRule("model.layers", order=[3, 0, 2, 1])], AutoModelForCausalLM),
    "qwen drop": (qwen, [DropRule("model.layers.2")], AutoModelForCausalLM),
    "t5 decoder": (t5, [DropRule("decoder.block.2")], AutoModelForSeq2SeqLM),
    "t5 encoder": (t5, [RepeatRule("encoder.block", order=[0, 1, 1])], AutoModelForSeq2SeqLM),
    "swin": (swin, [DropRule("swin.encoder.layers.1.blocks.1")], AutoModelForImageClassification),
}


@pytest.mark.parametrize("case", CASES)
def test_the_plain_class_opens_it_with_equal_outputs(case: str, tmp_path: Path) -> None:
    make, rules, auto = CASES[case]
    model = apply_rules(make(), [*rules, LoraRule("all-linear", rank=2, init="random")])
    before, wanted = Snapshot(model), output(model)
    merge_to(model, tmp_path)
    assert before.differences(model) == [] and torch.equal(output(model), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(other) is type(make()) and not any(report[key] for key in ("missing_keys", "unexpected_keys"))
    torch.testing.assert_close(output(other.eval()), wanted, atol=1e-5, rtol=1e-4)
    tied = [getattr(config, "tie_word_embeddings", None) for config in (other.config, model.config)]
    assert tied[0] == tied[1]


LIVE = CASES if os.environ.get("ALL_STRUCTURE") else ["llama tied", "llama shared", "qwen reorder"]


@pytest.mark.parametrize("case", LIVE)
def test_save_pretrained_writes_the_structure_of_a_live_model(case: str, tmp_path: Path) -> None:
    make, rules, auto = CASES[case]
    model = apply_rules(make(), rules)
    before, wanted = Snapshot(model), output(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        other = auto.from_pretrained(tmp_path).eval()
    assert before.differences(model) == [] and torch.equal(output(other), wanted)
    model.save_pretrained(tmp_path / "again", state_dict=model.state_dict())
    assert torch.equal(output(auto.from_pretrained(tmp_path / "again").eval()), wanted)


def test_shards_and_the_generation_config(tmp_path: Path) -> None:
    model = llama()
    model.generation_config.pad_token_id = 7
    apply_rules(model, [DropRule("model.layers.1"), LoraRule("q_proj", rank=2, init="random")])
    wanted = model.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    merge_to(model, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["pad_token_id"] == 7
    other: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(other.generate(IDS[:1], max_new_tokens=5, do_sample=False), wanted)
    names = {key for file in tmp_path.glob("*.safetensors") for key in _keys(file)}
    assert not any("layers.2" in name for name in names) and any("layers.1" in name for name in names)
    with pytest.warns(SurgeryWarning, match="leaves out its adapters"):
        model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


def _keys(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def test_a_module_of_another_kind_is_refused_with_a_way_out(tmp_path: Path) -> None:
    model = apply_rules(llama(), ReplaceRule("model.layers.1.mlp", by="torch.nn.Identity"))
    with pytest.raises(PlanError, match=r"ReplaceRule can't be merged(.|\n)*save_surgery\(model, folder\)"):
        merge_to(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_structure_without_a_plain_class_is_refused(tmp_path: Path) -> None:
    """A T5 encoder's configuration has one number of layers; a stage of another model's list may have none."""
    model = apply_rules(llama(), DropRule("model.layers.1"))
    state: Any = vars(model)["_surgery_model"]
    state.structure[0].unplain.append("no field says so")
    with pytest.raises(SurgeryError, match=r"no plain checkpoint can hold this model\n  why:   no field says so"):
        merge_to(model, tmp_path)
    with pytest.warns(SurgeryWarning, match="from_pretrained of LlamaForCausalLM does not build the model in"):
        model.save_pretrained(tmp_path)


def test_a_structure_is_not_merged() -> None:
    model = apply_rules(llama(), DropRule("model.layers.1"), adapter="cut")
    apply_rules(model, LoraRule("q_proj", rank=2, init="random"), adapter="a")
    wanted = model(IDS).logits
    with pytest.raises(MergeError, match=r"'cut' can't be merged(.|\n)*commit\(model\)"):
        merge(model, ["a", "cut"])
    assert merge(model).adapters == ("a",) and len(model.model.layers) == 2
    torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=1e-4)
    unmerge(model)
    assert torch.equal(model(IDS).logits, wanted) and active(model) == ("cut", "a")
    only = apply_rules(llama(), DropRule("model.layers.1"))
    assert merge(only).sites == 0
    mixed = apply_rules(llama(), [DropRule("model.layers.1"), LoraRule("q_proj", rank=2, init="random")], adapter="m")
    assert merge(mixed, "m").sites == 2 and len(mixed.model.layers) == 2


def test_a_model_that_was_merged_before_stays_merged(tmp_path: Path) -> None:
    model = apply_rules(llama(), LoraRule("q_proj", rank=2, init="random"))
    plain = Snapshot(model)
    merge(model)
    merged = model.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.warns(SurgeryWarning, match="merged already"):
        merge_to(model, tmp_path)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, merged)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, model(IDS).logits)
    unmerge(model)
    assert not plain.differences(model)


@pytest.mark.parametrize("tied", [True, False])
def test_another_vocabulary_and_other_ties(tied: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tied)
    rules = [ResizeVocabRule(tokens=53), UntieRule() if tied else TieRule(), LoraRule("q_proj", rank=2, init="random")]
    apply_rules(model, rules)
    for parameter in (model.model.embed_tokens.weight, model.lm_head.weight):
        torch.nn.init.normal_(parameter, std=0.1)
    new = torch.tensor([[3, 51, 52]])
    before, expected = Snapshot(model), model(new).logits
    merge_to(model, tmp_path)
    assert not before.differences(model)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert plain.config.vocab_size == 53 and plain.config.tie_word_embeddings is not tied
    assert torch.allclose(plain(new).logits, expected, atol=1e-5)
    commit(model)
    assert torch.equal(model(new).logits, plain(new).logits)


def test_another_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    model = SwinForImageClassification(config).eval()
    apply_rules(model, [HeadRule(labels=["cat", "dog", "owl"]), LoraRule("q_proj", rank=2, init="random")])
    images = torch.randn(2, 3, 16, 16)
    expected = model(images).logits
    merge_to(model, tmp_path)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert plain.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert torch.allclose(plain(images).logits, expected, atol=1e-5)
