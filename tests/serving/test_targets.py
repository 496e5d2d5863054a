"""`save_adapter(target=…)` and `check_target`: what programs take, what is lowered, and what is refused."""

import copy
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from surgery import SurgeryError, apply_rules, check_target, load_adapter, remove, save_adapter, target_profiles
from surgery.rules import IA3Rule, LokrRule, LoraRule, PromptRule, TokensRule, TrainRule
from surgery.serving.push import answers_of
from tests.reports import targets
from tests.support.small_llama import SIZES, llama, logits

LANGUAGE = ("vllm", "sglang", "tensorrt-llm", "llama.cpp", "mlx", "openvino", "onnxruntime-genai")
ADAPTERS = {
    "lora": [LoraRule(["q_proj", "v_proj"], rank=4, alpha=8, init="random")],
    "rslora": [LoraRule("q_proj", rank=4, alpha=6, rslora=True, init="random")],
    "ranks": [LoraRule(["q_proj", "down_proj"], rank=4, rank_pattern={"q_proj": 2}, init="random")],
    "alphas": [LoraRule(["q_proj", "down_proj"], rank=4, alpha_pattern={"q_proj": 3}, init="random")],
    "dora": [LoraRule("q_proj", rank=4, dora=True, init="random")],
    "ia3": [IA3Rule("k_proj", init="random")],
    "lokr": [LokrRule("q_proj", rank=2, init="random")],
    "pissa": [LoraRule("q_proj", rank=2, init="pissa")],
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_a_program_takes_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    model = apply_rules(llama(), ADAPTERS[name])
    wanted = logits(model)
    other = llama()
    for target in LANGUAGE:
        assert check_target(model, target), target
        save_adapter(model, tmp_path / target, target=target)
        load_adapter(other, tmp_path / target, format=target_profiles()[target].format)
        # conversions to LoRA, and scales that are multiplied into B, round once to float32
        torch.testing.assert_close(logits(other), wanted, rtol=1e-5, atol=1e-6, msg=target)
        remove(other)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_sglang_gets_one_rank_one_scale_and_whole_groups(tmp_path: Path) -> None:
    rule = LoraRule(["q_proj", "down_proj"], rank=4, alpha=8, rank_pattern={"q_proj": 2}, init="random")
    model = apply_rules(llama(), rule)
    save_adapter(model, tmp_path, target="sglang")
    config = config_of(tmp_path)
    assert config["r"] == 4 and not config["rank_pattern"] and not config["alpha_pattern"]
    assert "model.layers.0.self_attn.k_proj" in config["target_modules"]
    sites = {site.path.rpartition(".")[-1]: site for site in check_target(model, "sglang").sites}
    assert sites["k_proj"].how.startswith("zeros are written")
    assert "filled up with zeros to 4" in sites["q_proj"].how


def test_vllm_gets_patterns(tmp_path: Path) -> None:
    model = apply_rules(llama(), LoraRule(["q_proj", "down_proj"], rank=4, rank_pattern={"q_proj": 2}))
    save_adapter(model, tmp_path, target="vllm")
    assert list(config_of(tmp_path)["rank_pattern"].values()) == [4]  # the more frequent rank is r


def test_several_adapters_become_one(tmp_path: Path) -> None:
    model = apply_rules(llama(), LoraRule("q_proj", rank=2, init="random"), adapter="a")
    apply_rules(model, LoraRule("v_proj", rank=4, init="random"), adapter="b")
    wanted = logits(model)
    save_adapter(model, tmp_path, ["a", "b"], target="vllm")
    other = llama()
    load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rules, target, words",
    [
        ([LoraRule("q_proj"), TrainRule("lm_head")], "vllm", "tensors in full"),
        ([LoraRule("q_proj", lora_bias=True)], "vllm", "bias of a LoRA"),
        ([LoraRule("q_proj", invocation=[1, 2])], "vllm", "act on all tokens"),
        ([LoraRule("embed_tokens")], "tensorrt-llm", "does not adapt embed_tokens"),
        ([LoraRule("lm_head")], "tensorrt-llm", "does not adapt lm_head"),
        ([PromptRule()], "llama.cpp", "virtual tokens are not a change of a weight"),
        ([LoraRule("q_proj")], "diffusers", "component"),
    ],
)
def test_the_rest_is_refused_before_anything_is_written(rules: list, target: str, words: str, tmp_path: Path) -> None:
    model = apply_rules(llama(), rules)
    report = check_target(model, target)
    assert not report and report.problems and report.remedies
    with pytest.raises(SurgeryError, match=words):
        save_adapter(model, tmp_path / "new", target=target)
    assert not (tmp_path / "new").exists()


def test_files_are_checked_as_the_model_is(tmp_path: Path) -> None:
    model = apply_rules(llama(), LoraRule("q_proj", rank=4, alpha=3, rslora=True, init="random"))
    save_adapter(model, tmp_path / "peft", format="peft")
    save_adapter(model, tmp_path / "surgery", format="surgery")
    report = check_target(tmp_path / "peft", "mlx", base=model)
    assert report.sites == check_target(model, "mlx").sites
    assert not check_target(tmp_path / "surgery", "mlx")


def test_a_class_that_the_program_does_not_adapt(tmp_path: Path) -> None:
    model = apply_rules(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraRule("0", rank=2))
    assert "does not have the class Sequential" in str(check_target(model, "vllm"))
    assert "openvino" in check_target(model, "vllm").others


def test_a_head_in_full_goes_where_the_program_takes_it(tmp_path: Path) -> None:
    """Beside LoRA, and beside a rule that becomes LoRA."""
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=0)).eval()
    for rules in ([LoraRule("q_proj", init="random")], [IA3Rule("q_proj", init="random")]):
        model = apply_rules(copy.deepcopy(base), [*rules, TrainRule("score")])
        with torch.no_grad():
            model.get_parameter("score.adapters.default.weight").mul_(2)
        wanted, other = logits(model), copy.deepcopy(base)
        folder = save_adapter(model, tmp_path / rules[0].name, target="vllm")
        assert config_of(folder)["modules_to_save"] == ["score"]
        load_adapter(other, folder)
        torch.testing.assert_close(logits(other), wanted, rtol=1e-5, atol=1e-6)


def test_the_reference_page_has_the_facts_of_the_profiles() -> None:
    assert targets.PAGE.read_text(encoding="utf-8") == targets.page(), "run python -m tests.reports.targets"


def test_every_fact_that_is_not_a_default_has_a_source() -> None:
    own = {"name", "title", "version", "format", "sources", "rank_choices", "rank_option", "command", "notes"}
    own |= {"other_classes", "paths_reason", "embedding_classes"}
    for profile in target_profiles().values():
        said = {item.name for item in fields(profile) if getattr(profile, item.name) != item.default} - own
        said = {name for name in said if getattr(profile, name)}
        assert said <= profile.sources.keys(), (profile.name, said - profile.sources.keys())


def test_the_card_says_which_programs_open_the_files() -> None:
    model = apply_rules(llama(), LoraRule("q_proj", rank=4, rslora=True))
    answers = dict(answers_of(model, "default", "peft"))
    assert answers["vLLM 0.32.0"] == "yes"
    assert answers["SGLang 0.5.23"].startswith("after `save_adapter")  # it ignores use_rslora
    assert answers["diffusers 0.42.1"].startswith("no: ")
    other = dict(answers_of(apply_rules(llama(), IA3Rule("k_proj")), "default", "peft"))
    assert other["vLLM 0.32.0"].startswith("perhaps, as a LoRA")
    prompts = dict(answers_of(apply_rules(llama(), PromptRule()), "default", "peft"))
    assert prompts["vLLM 0.32.0"] == "no: virtual tokens are not a change of a weight"


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_become_a_lora_on_the_embedding(tied: bool, tmp_path: Path) -> None:
    """Of tied weights, the head has the trained rows, too: LoRA on both, or a refusal."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()
    model = apply_rules(
        copy.deepcopy(base), [LoraRule("q_proj", init="random"), TokensRule("embed_tokens", tokens=[3, 5])]
    )
    for name, parameter in model.named_parameters():
        if "adapters" in name and "embed_tokens" in name:
            with torch.no_grad():
                parameter.add_(1)
    wanted = logits(model)
    for target in ("vllm", "sglang", "mlx", "llama.cpp"):
        if not check_target(model, target):
            assert tied and target in ("mlx", "llama.cpp")
            continue
        save_adapter(model, tmp_path / target, target=target)
        other = copy.deepcopy(base)
        load_adapter(other, tmp_path / target, format=target_profiles()[target].format)
        torch.testing.assert_close(logits(other), wanted, rtol=1e-5, atol=1e-5, msg=target)
