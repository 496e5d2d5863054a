"""The base's embeddings in PEFT's files, both ways: targeted or not, tied or not, with other rows, with more."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import surgery.peft
import surgery.rules  # noqa: F401  # brings the methods
from surgery import (
    LoadError,
    SurgeryError,
    apply_rules,
    hotswap,
    load_adapter,
    merge,
    remove,
    rules_of,
    save_adapter,
    summary,
    unmerge,
)
from surgery.peft import LoraConfig, PeftModel, get_peft_model
from surgery.rules import LoraRule, TrainRule
from surgery.testing import Snapshot
from tests.support.conformance import of_transformers
from tests.support.peers import peft, transformers

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]  # PEFT's own words
WORDS = 99


def saved(folder: Path, name: str, **more: Any) -> Callable[..., Any]:
    """A small model in a folder, and how to load it, with so many words more."""
    torch.manual_seed(0)
    of_transformers(name, num_hidden_layers=1, **more).save_pretrained(folder / "base")

    def load(grown: int = 0) -> Any:
        model = getattr(transformers, name).from_pretrained(folder / "base").eval()
        if grown:
            model.resize_token_embeddings(WORDS + grown)
        return model

    return load


def logits(model: Any, grown: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, WORDS + grown - 1, 5, 7]])).logits


def keys_in(folder: Path) -> set[str]:
    held = set(safetensors.torch.load_file(str(folder / "adapter_model.safetensors")))
    return {key for key in held if ".original_module." not in key and ".modules_to_save." not in key}  # read by no one


def theirs(model: Any, folder: Path, save: dict[str, Any], **fields: Any) -> Any:
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **copy.deepcopy(fields))).eval()
    made.save_pretrained(folder, **save)
    return made


LLAMA, GPT2 = "LlamaForCausalLM", "GPT2LMHeadModel"
SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
CASES: dict[str, tuple[str, dict[str, Any], int, dict[str, Any]]] = {
    "head": (LLAMA, {"target_modules": ["lm_head"]}, 0, {}),
    "embedding": (LLAMA, {"target_modules": ["embed_tokens", "q_proj"]}, 0, {}),
    "both": (LLAMA, {"target_modules": ["embed_tokens", "lm_head"]}, 0, {}),
    "both, grown": (LLAMA, {"target_modules": ["embed_tokens", "lm_head"]}, 2, {}),
    "DoRA, grown": (LLAMA, {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}, 2, {}),
    "regular expression": (LLAMA, {"target_modules": ".*(lm_head|q_proj)"}, 0, {}),
    "neither, grown": (LLAMA, {"target_modules": ["q_proj"]}, 2, {}),
    "asked for": (LLAMA, {"target_modules": ["q_proj"]}, 0, {"save_embedding_layers": True}),
    "not asked for": (LLAMA, {"target_modules": ["lm_head"]}, 0, {"save_embedding_layers": False}),
    "trained whole, grown": (LLAMA, SAVED, 2, {}),
    "tokens, grown": (LLAMA, {"target_modules": ["q_proj"], "trainable_token_indices": [WORDS + 1, 5]}, 2, {}),
    "GPT-2's embedding": (GPT2, {"target_modules": ["wte"]}, 0, {}),
    "GPT-2's head": (GPT2, {"target_modules": ["lm_head", "c_attn"]}, 0, {}),
    "GPT-2, grown": (GPT2, {"target_modules": ["c_attn"]}, 3, {}),
    "GPT-2, all": (GPT2, {"target_modules": ["c_attn", "wte"]}, 3, {"save_embedding_layers": True}),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_files_with_embeddings_cross_both_ways(case: str, tied: bool, tmp_path: Path) -> None:
    name, fields, grown, save = CASES[case]
    if not tied and name == GPT2:
        pytest.skip("it is tied")
    load = saved(tmp_path, name, **({"tie_word_embeddings": True} if tied else {}))
    expected = logits(theirs(load(grown), tmp_path / "theirs", save, **fields), grown)
    model, how = load(0), {}
    if grown:
        before = Snapshot(model)
        with pytest.raises(LoadError, match=r"resize_token_embeddings\(10[12]\)"):
            load_adapter(model, tmp_path / "theirs")
        assert not before.differences(model)
        how = {"resize": True}
    report = load_adapter(model, tmp_path / "theirs", **how)  # type: ignore[arg-type]
    assert report and torch.allclose(logits(model, grown), expected, atol=1e-5)
    assert len(report.assumed) == (0 if not grown or fields is SAVED else 1 if tied else 2)
    merge(model, untie=True)
    assert torch.allclose(logits(model, grown), expected, atol=1e-5)
    save_adapter(model, tmp_path / "merged", format="peft", **save)
    unmerge(model)
    save_adapter(model, tmp_path / "ours", format="peft", **save)
    tokens = "token_adapter" if "tokens" in case else "\n"  # PEFT writes them twice of a tied model
    for folder in ("ours", "merged"):
        assert {k for k in keys_in(tmp_path / folder) ^ keys_in(tmp_path / "theirs") if tokens not in k} == set()
        again = peft.PeftModel.from_pretrained(load(grown), str(tmp_path / folder)).eval()
        assert torch.allclose(logits(again, grown), expected, atol=1e-5)
    load_adapter(again := load(grown), tmp_path / "ours")
    assert torch.allclose(logits(again, grown), expected, atol=1e-5)
    before = Snapshot(plain := load(grown))
    load_adapter(plain, tmp_path / "theirs")
    assert not before.differences(remove(plain))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rows_that_differ_are_the_adapters_and_are_not_trained(tied: bool, tmp_path: Path) -> None:
    load = saved(tmp_path, LLAMA, tie_word_embeddings=tied)
    other = load()
    with torch.no_grad():
        other.get_input_embeddings().weight[5] += 1.0
    expected = logits(theirs(other, tmp_path / "a", {}, target_modules=["embed_tokens", "lm_head"]))
    report = load_adapter(model := load(), tmp_path / "a")
    assert torch.allclose(logits(model), expected, atol=1e-5)
    (told,) = report.assumed
    assert "1 of 99 rows" in told and rules_of(model)[0].tokens == (5,)  # type: ignore[attr-defined]
    count = sum(parameter.numel() for name, parameter in other.named_parameters() if "lora_" in name)
    assert summary(model).trainable == count
    for format in ("peft", "surgery"):
        save_adapter(model, tmp_path / format, format=format)  # type: ignore[arg-type]
        load_adapter(again := load(), tmp_path / format)
        assert torch.equal(logits(again), logits(model))


def test_a_base_in_another_precision_is_the_same(tmp_path: Path) -> None:
    load = saved(tmp_path, LLAMA)
    theirs(load().to(torch.bfloat16), tmp_path / "half", {}, target_modules=["lm_head"])
    report = load_adapter(load(), tmp_path / "half", strict=False)
    base = saved(tmp_path, LLAMA)().to(torch.bfloat16).float()
    assert not load_adapter(base, tmp_path / "half").assumed and report is not None
    theirs(load(), tmp_path / "full", {}, target_modules=["lm_head"])
    assert not load_adapter(load().to(torch.bfloat16), tmp_path / "full").assumed


def test_two_matrices_for_one_weight(tmp_path: Path) -> None:
    load = saved(tmp_path, LLAMA)
    theirs(load(), tmp_path / "a", {}, target_modules=["embed_tokens", "lm_head"])
    (tmp_path / "other").mkdir()
    tied = saved(tmp_path / "other", LLAMA, tie_word_embeddings=True)()
    before = Snapshot(tied)
    with pytest.raises(LoadError, match="two matrices"):
        load_adapter(tied, tmp_path / "a")
    assert not before.differences(tied)


def test_other_tensors_of_the_base_must_be_the_bases(tmp_path: Path) -> None:
    load = saved(tmp_path, LLAMA)
    theirs(load(), tmp_path, {}, target_modules=["q_proj"])
    path = str(tmp_path / "adapter_model.safetensors")
    held, norm = safetensors.torch.load_file(path), load().model.norm.weight.detach()
    safetensors.torch.save_file({**held, "base_model.model.model.norm.weight": norm.clone()}, path)
    assert load_adapter(load(), tmp_path)
    safetensors.torch.save_file({**held, "base_model.model.model.norm.weight": norm + 1}, path)
    with pytest.raises(LoadError, match="not of this adapter: base_model.model.model.norm.weight"):
        load_adapter(load(), tmp_path)


def test_a_load_that_fails_leaves_the_size(tmp_path: Path) -> None:
    load = saved(tmp_path, LLAMA)
    theirs(load(2), tmp_path, {}, target_modules=["q_proj"])
    path = str(tmp_path / "adapter_model.safetensors")
    held = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**held, "base_model.model.model.x.lora_A.weight": torch.zeros(2, 2)}, path)
    plain = logits(model := load())
    with pytest.raises(LoadError, match="not of this adapter"):
        load_adapter(model, tmp_path, resize=True)
    assert model.config.vocab_size == WORDS and torch.equal(logits(model), plain)
    apply_rules(model, [LoraRule("v_proj")], adapter="there")
    safetensors.torch.save_file(held, path)
    with pytest.raises(SurgeryError, match="does not resize a model with adapters"):
        load_adapter(model, tmp_path, resize=True)


def test_our_own_format_says_the_size_too(tmp_path: Path) -> None:
    load = saved(tmp_path, LLAMA)
    trained = apply_rules(load(2), [TrainRule(["embed_tokens", "lm_head"]), LoraRule("q_proj", rank=2, init="random")])
    save_adapter(trained, tmp_path / "own", format="surgery")
    with pytest.raises(LoadError, match="vocabulary of 101 tokens, and this model's has 99"):
        load_adapter(load(), tmp_path / "own")
    load_adapter(model := load(), tmp_path / "own", resize=True)
    assert torch.equal(logits(model, 2), logits(trained, 2))
    live = apply_rules(load(), [TrainRule(["embed_tokens", "lm_head"]), LoraRule("q_proj", rank=2)])
    before = Snapshot(live)
    with pytest.raises(LoadError, match="vocabulary of 101 tokens, and this model's has 99"):
        hotswap(live, "default", tmp_path / "own")
    assert before.differences(live) == []


def test_the_facade(tmp_path: Path) -> None:
    load = saved(tmp_path, LLAMA)
    expected = logits(theirs(load(2), tmp_path / "a", {}, target_modules=["lm_head", "embed_tokens"]), 2)
    with pytest.raises(LoadError, match="resize_token_embeddings"):
        PeftModel.from_pretrained(load(), tmp_path / "a")
    model = PeftModel.from_pretrained(load(2), tmp_path / "a")
    assert torch.allclose(logits(model, 2), expected, atol=1e-5)
    model.save_pretrained(tmp_path / "b")
    assert keys_in(tmp_path / "b") == keys_in(tmp_path / "a")
    model = get_peft_model(load(), LoraConfig(r=2, target_modules=["lm_head"]))
    for save, kept in (("auto", True), (True, True), (False, False)):
        model.save_pretrained(tmp_path / "c", save_embedding_layers=save)
        assert any("base_layer" in key for key in keys_in(tmp_path / "c")) is kept
    told = json.loads((tmp_path / "c/adapter_config.json").read_text())
    assert told["target_modules"] == ["lm_head"]


@pytest.mark.parametrize("method", ["save_pretrained", "get_peft_model_state_dict"])
def test_embeddings_that_are_saved_are_warned_of(method: str, tmp_path: Path) -> None:
    """PEFT warns where "auto" saves embeddings, and where the model does not tell which modules are embeddings."""

    def told(library: Any, model: Any, targets: list[str], save: Any) -> list[str]:
        made = library.get_peft_model(copy.deepcopy(model), library.LoraConfig(r=2, target_modules=targets))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if method == "save_pretrained":
                made.save_pretrained(tmp_path / library.__name__, save_embedding_layers=save)
            else:
                library.get_peft_model_state_dict(made, save_embedding_layers=save)
        return [str(warning.message) for warning in caught if "embedding" in str(warning.message)]

    text, plain = of_transformers("LlamaForCausalLM"), torch.nn.Sequential(torch.nn.Embedding(9, 8))
    for model, targets, save, count in (
        (text, ["embed_tokens", "q_proj"], "auto", 1), (text, ["q_proj"], "auto", 0), (text, ["embed_tokens"], True, 0),
        (text, ["embed_tokens"], False, 0), (plain, ["0"], True, 1), (plain, ["0"], "auto", 0),
    ):  # fmt: skip
        found = told(surgery.peft, model, targets, save)
        assert found == told(peft, model, targets, save) and len(found) == count
