"""ResizeVocabRule against transformers' own resize_token_embeddings with the same rows, and against plain torch."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    PlanError,
    RuleError,
    SurgeryError,
    SurgeryWarning,
    activate,
    adapter_state_dict,
    apply_rules,
    deactivate,
    load_adapter,
    load_adapter_state_dict,
    plan_rules,
    remove,
    rules_from_json,
    rules_to_json,
    save_adapter,
)
from surgery.rules import LoraRule, ResizeVocabRule, TokensRule, TrainRule
from surgery.testing import Snapshot
from tests.support.built_models import SEQ2SEQ, SIZES, TEXT, build_model, logits_of
from tests.support.sampling import sample

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[3, 4, 5, 41, 6, 44]])  # with new tokens
OLD = torch.tensor([[3, 4, 5, 11, 6, 9]])
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("LlamaForCausalLM", {**TEXT, "tie_word_embeddings": True}),
    "llama, untied": ("LlamaForCausalLM", TEXT),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "eos_token_id": 1}),
    "t5": ("T5ForConditionalGeneration", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2,
                                          "vocab_size": 40, "decoder_start_token_id": 0}),
    "bert, a bias": ("BertForMaskedLM", TEXT),
    "opt": ("OPTForCausalLM", {**SIZES, "ffn_dim": 16, "vocab_size": 40, "word_embed_proj_dim": 16}),
    "marian, final_logits_bias": ("MarianMTModel", SEQ2SEQ),
    "gemma": ("Gemma2ForCausalLM", {**TEXT, "head_dim": 8, "num_key_value_heads": 1}),
    "gemma 3, a nested configuration": (
        "Gemma3ForConditionalGeneration",
        {"text_config": {**TEXT, "head_dim": 8, "num_key_value_heads": 1},
         "vision_config": {**SIZES, "image_size": 16, "patch_size": 8}, "mm_tokens_per_image": 1,
         "image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5},
    ),
    "distilbert": ("DistilBertForMaskedLM", {"dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2,
                                             "vocab_size": 40}),
}  # fmt: skip


def build(name: str, **fields: Any) -> Any:
    kind, own = CASES[name]
    return build_model(kind, {**own, **fields})


def call(model: Any, ids: Tensor = IDS) -> Tensor:
    return logits_of(model, ids)


def by_transformers(name: str, model: Any, size: int, **fields: Any) -> Any:
    """A model that transformers resized, with the rows of another one."""
    resized = build(name, **fields)
    resized.resize_token_embeddings(size, mean_resizing=False)
    resized.load_state_dict({key: t for key, t in model.state_dict().items() if ".adapters." not in key})
    resized.tie_weights()
    return resized.to(next(model.parameters()).dtype)


@pytest.mark.parametrize("size", [45, 20])
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_transformers_makes(name: str, size: int) -> None:
    fields = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2} if "llama" in name or name == "gpt2" else {}
    model = build(name, **fields)
    before, config = Snapshot(model), model.config
    assert plan_rules(model, ResizeVocabRule(tokens=size)) and not before.differences(model)
    apply_rules(model, ResizeVocabRule(tokens=size))
    other = by_transformers(name, model, size, **fields)
    assert model.config.to_dict() == other.config.to_dict()
    rebuilt = type(model)(model.config)  # the configuration builds it
    assert {k: t.shape for k, t in rebuilt.state_dict().items()} == {k: t.shape for k, t in model.state_dict().items()}
    assert str(rebuilt) == str(model)
    if size > 40:
        optimizers = [torch.optim.SGD(item.parameters(), lr=0.5) for item in (model, other)]
        for _ in range(2):
            assert torch.equal(call(model), call(other))
            for item, optimizer in zip((model, other), optimizers, strict=True):
                optimizer.zero_grad()
                call(item).square().mean().backward()
                optimizer.step()
        model.tie_weights()
        assert torch.equal(call(model), call(other))
    else:
        assert torch.equal(call(model, OLD), call(other, OLD))
        remove(model)
        assert not before.differences(model) and model.config is config


@pytest.mark.parametrize("name", sample(CASES, 4))
def test_new_tokens_train_are_saved_and_load_on_a_base_that_was_not_resized(name: str, tmp_path: Path) -> None:
    model = build(name)
    before, new = Snapshot(model), [40, 41, 42, 43, 44]
    embedding = {id(m): path for path, m in model.named_modules()}[id(model.get_input_embeddings())]
    rules = [ResizeVocabRule(tokens=45), TokensRule(embedding, tokens=new)]
    assert rules_from_json(rules_to_json(rules)) == rules
    apply_rules(model, rules)
    assert [p.shape for p in model.parameters() if p.requires_grad] == [(5, 16)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    call(model).square().mean().backward()
    optimizer.step()
    expected = call(model)
    save_adapter(model, tmp_path)
    sizes = {key: tensor.shape[0] for key, tensor in adapter_state_dict(model).items() if "final_logits" not in key}
    assert set(sizes.values()) == {5}, sizes
    fresh = build(name)
    report = load_adapter(fresh, tmp_path)
    assert torch.equal(call(fresh), expected) and not report.base
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call(other), expected)
        assert torch.equal(call(remove(other), OLD), call(build(name), OLD))
    again = apply_rules(build(name), rules)
    load_adapter_state_dict(again, adapter_state_dict(model))
    assert torch.equal(call(again), expected)
    remove(model)
    assert not before.differences(model)


@pytest.mark.parametrize("name", ["llama, tied", "llama, untied", "bert, a bias"])
def test_a_base_that_is_trained_meanwhile_keeps_its_rows(name: str, tmp_path: Path) -> None:
    model = build(name)
    weight = model.get_input_embeddings().weight
    apply_rules(model, ResizeVocabRule(tokens=45), freeze=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    call(model).square().mean().backward()
    optimizer.step()
    trained, expected = model.get_input_embeddings().weight.detach().clone(), call(model, OLD)[..., :40]
    save_adapter(model, tmp_path)
    remove(model)
    assert model.get_input_embeddings().weight is weight and torch.equal(weight, trained[:40])
    assert torch.allclose(call(model, OLD), expected, atol=1e-6)  # another width of the head's matrix
    load_adapter(model, tmp_path)
    assert torch.equal(model.get_input_embeddings().weight, trained)


@pytest.mark.parametrize("order", ["before", "after", "together"])
@pytest.mark.parametrize("name", ["llama, untied", "llama, tied"])
def test_adapters_on_the_embedding_follow(name: str, order: str) -> None:
    model = build(name)
    before = Snapshot(model)
    lora = LoraRule("lm_head", rank=2, init="random")
    resize = ResizeVocabRule(tokens=45)
    if order == "before":
        apply_rules(model, lora, adapter="lora")
        alone = call(model, OLD)
        B = model.lm_head.adapters.lora.B
        apply_rules(model, resize, adapter="size")
        assert B is model.lm_head.adapters.lora.B and B.shape == (45, 2)
        assert torch.allclose(call(model, OLD)[..., :40], alone, atol=1e-6)
        remove(model, "size")
        assert B is model.lm_head.adapters.lora.B and torch.equal(call(model, OLD), alone)
    elif order == "after":
        apply_rules(model, resize, adapter="size")
        apply_rules(model, lora, adapter="lora")
        assert model.lm_head.adapters.lora.B.shape == (45, 2)
        with pytest.raises(SurgeryError, match="'lora' has entries for tokens that would go"):
            remove(model, "size")
    else:
        apply_rules(model, [lora, resize])
        assert model.lm_head.adapters.default.B.shape == (45, 2)
    remove(model)
    assert not before.differences(model)


def test_a_failed_apply_leaves_grown_adapters_as_they_were() -> None:
    model = apply_rules(build("llama, untied"), LoraRule("lm_head", rank=2, init="random"), adapter="lora")
    expected, B = call(model, OLD), model.lm_head.adapters.lora.B
    assert plan_rules(model, ResizeVocabRule(tokens=45), adapter="size") and B.shape == (40, 2)
    with pytest.raises(PlanError):
        apply_rules(model, [ResizeVocabRule(tokens=45), LoraRule("nothing")], adapter="size")
    assert B.shape == (40, 2) and torch.equal(call(model, OLD), expected)
    apply_rules(model, TokensRule("lm_head", tokens=[39]), adapter="tokens")
    with pytest.raises(PlanError, match="none of number 39"):
        apply_rules(model, ResizeVocabRule(tokens=30), adapter="size")
    assert torch.equal(call(model, OLD), expected)


def test_rules_on_new_rows_go_first() -> None:
    model = apply_rules(build("llama, tied"), ResizeVocabRule(tokens=45), adapter="size")
    apply_rules(model, TokensRule(["embed_tokens", "lm_head"], tokens=[41]), adapter="rows")
    with pytest.raises(SurgeryError, match="rows"):
        remove(model, "size")
    deactivate(model)
    activate(model)
    remove(model, "rows")
    remove(model, "size")
    assert not hasattr(model, "_surgery_model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_starts_of_new_rows(dtype: torch.dtype) -> None:
    def rows(**fields: Any) -> Tensor:
        model = build("bert, a bias").to(dtype)
        apply_rules(model, ResizeVocabRule(tokens=43, **fields))
        weight = model.get_input_embeddings().weight
        assert weight.dtype == dtype and torch.equal(weight[:40], base) and model.cls.predictions.bias.shape == (43,)
        return weight[40:].detach()

    base = build("bert, a bias").to(dtype).get_input_embeddings().weight.detach()
    exact = base.float()
    assert torch.equal(rows(), exact.mean(0).to(dtype).expand(3, 16))
    assert not rows(init="zeros").any()
    copied = rows(init="copy", sources=[7, [2, 3]])
    assert torch.equal(copied[0], base[7]) and torch.equal(copied[1], exact[[2, 3]].mean(0).to(dtype))
    assert torch.equal(copied[2], exact.mean(0).to(dtype))
    drawn = rows(init="normal")
    assert 0.005 < drawn.float().std() < 0.05
    given = torch.randn(3, 16)
    assert torch.equal(rows(init=given), given.to(dtype))
    path = "bert.embeddings.word_embeddings"
    assert torch.equal(rows(init={path: given}), given.to(dtype))


def test_given_rows_are_in_the_files_of_the_adapter(tmp_path: Path) -> None:
    rows = torch.randn(5, 16)
    rule = ResizeVocabRule(tokens=45, init=rows)
    model = apply_rules(build("llama, tied"), rule)
    with pytest.raises(RuleError, match="can't be written"):
        rules_to_json([rule])
    save_adapter(model, tmp_path)
    load_adapter(fresh := build("llama, tied"), tmp_path)
    assert torch.equal(fresh.lm_head.weight[40:], rows) and fresh.lm_head.weight is fresh.model.embed_tokens.weight


def test_random_starts_draw_once_when_applied() -> None:
    rule, model = ResizeVocabRule(tokens=45, init="normal"), build("llama, tied")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    plan_rules(model, rule)
    assert torch.equal(torch.get_rng_state(), state)
    apply_rules(model, rule)
    assert not torch.equal(torch.get_rng_state(), state)


def test_padding_to_a_multiple() -> None:
    model = apply_rules(build("gpt2"), ResizeVocabRule(tokens=41, pad_to_multiple_of=16))
    assert model.config.vocab_size == 48 and model.lm_head.out_features == 48
    model = apply_rules(build("gpt2"), ResizeVocabRule(pad_to_multiple_of=64))
    assert model.transformer.wte.num_embeddings == 64
    with pytest.warns(SurgeryWarning, match="40 tokens already"):
        apply_rules(build("gpt2"), ResizeVocabRule(pad_to_multiple_of=8))


def test_tokens_that_the_configuration_uses_stay() -> None:
    model = build("llama, tied", eos_token_id=[2, 39], pad_token_id=38)
    with pytest.raises(PlanError, match=r"config.(eos_token_id = 39|pad_token_id = 38)"):
        apply_rules(model, ResizeVocabRule(tokens=39 - 1))
    model = build("llama, tied", eos_token_id=2)
    model.generation_config.suppress_tokens = [1, 35]
    with pytest.raises(PlanError, match="generation_config.suppress_tokens = 35"):
        apply_rules(model, ResizeVocabRule(tokens=30))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = 40
        self.embed = nn.Embedding(40, 8, padding_idx=0)
        self.head = nn.Linear(8, 40)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_without_a_configuration(tied: bool) -> None:
    model: Any = Net()
    if tied:
        model.head.weight = model.embed.weight
    before, expected = Snapshot(model), model(OLD)
    apply_rules(model, ResizeVocabRule(["embed", "head"], tokens=45))
    assert (model.vocab_size, model.embed.num_embeddings, model.head.out_features) == (45, 45, 45)
    assert (model.head.weight is model.embed.weight) is tied and model.head.bias.shape == (45,)
    assert torch.allclose(model(OLD)[..., :40], expected, atol=1e-6) and model(IDS).shape == (1, 6, 45)
    remove(model)
    assert not before.differences(model) and torch.equal(model(OLD), expected)


def test_beside_adapters_that_freeze_the_base() -> None:
    model = build("llama, untied")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    apply_rules(model, LoraRule("q_proj", rank=2), adapter="lora")
    apply_rules(model, ResizeVocabRule(tokens=45), adapter="size")
    assert not model.lm_head.weight.requires_grad
    remove(model, "lora")
    assert model.lm_head.weight.requires_grad
    apply_rules(model, TrainRule("lm_head"), adapter="lora")
    remove(model, ["lora", "size"])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = build("bert, a bias")
    plan = plan_rules(model, [ResizeVocabRule(tokens=45), TokensRule("word_embeddings", tokens=[44])])
    assert plan and "40 → 45 tokens, tied" in " ".join(str(plan).split())
    assert model.get_input_embeddings().weight.shape == (40, 16)
    assert apply_rules(model, ResizeVocabRule(tokens=45)).get_output_embeddings().weight.shape == (45, 16)


def test_what_is_wrong_is_told() -> None:
    for fields in ({}, {"tokens": 0}, {"tokens": True}, {"tokens": 9, "init": "ones"}, {"tokens": 9, "init": "copy"},
                   {"tokens": 9, "sources": [1]}, {"tokens": 9, "init": "copy", "sources": [-1]}):  # fmt: skip
        with pytest.raises(RuleError):
            ResizeVocabRule(**fields)  # type: ignore[arg-type]
    wrong: list[tuple[ResizeVocabRule, str]] = [
        (ResizeVocabRule(tokens=45, init=torch.zeros(4, 16)), "5 rows of"),
        (ResizeVocabRule(tokens=45, init={"nothing": torch.zeros(5, 16)}), "new rows for nothing"),
        (ResizeVocabRule(tokens=45, init="copy", sources=[40]), "no row 40"),
        (ResizeVocabRule(tokens=41, init="copy", sources=[1, 2]), "2 sources for 1"),
        (ResizeVocabRule("q_proj", tokens=45), "45"),
    ]
    for rule, text in wrong[:4]:
        plan = plan_rules(build("llama, tied"), rule)
        assert text in str(plan.problems[0]), str(plan.problems[0])
    with pytest.raises(PlanError, match="does not say which module embeds"):
        apply_rules(nn.Sequential(nn.Embedding(4, 4)), ResizeVocabRule(tokens=5))


@pytest.mark.parametrize("name", ["llama, tied", "llama, untied"])
def test_tensors_that_other_code_assigned_go_back_into_the_former_ones(name: str) -> None:
    model = build(name)
    weight, head = model.model.embed_tokens.weight, model.lm_head.weight
    apply_rules(model, ResizeVocabRule(tokens=45))
    loaded = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    model.load_state_dict(loaded, assign=True)
    remove(model)
    assert model.model.embed_tokens.weight is weight and model.lm_head.weight is head
    assert torch.equal(weight, loaded["model.embed_tokens.weight"][:40])
    assert torch.equal(head, loaded["lm_head.weight"][:40])


def test_rows_are_not_loaded_on_a_base_without_values(tmp_path: Path) -> None:
    save_adapter(apply_rules(build("llama, tied"), ResizeVocabRule(tokens=45)), tmp_path)
    with torch.device("meta"):
        model = build("llama, tied")
    with pytest.raises(SurgeryError, match="the base has no values yet"):
        load_adapter(model, tmp_path)
    assert model.lm_head.weight.shape == (40, 16) and not hasattr(model, "_surgery_model")


def test_the_padding_of_an_embedding_stays() -> None:
    model = nn.Sequential(nn.Embedding(40, 4, padding_idx=-1))
    with pytest.raises(PlanError, match=r"0.padding_idx = 39"):
        apply_rules(model, ResizeVocabRule("0", tokens=30))
    assert apply_rules(model, ResizeVocabRule("0", tokens=45))[0].padding_idx == 39
