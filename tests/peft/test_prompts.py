"""Prompts, prefixes and adaption prompts in PEFT's files: old files, what is refused, and what each computes."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    LoadError,
    PlanError,
    RuleError,
    SurgeryError,
    adapter_state_dict,
    apply_rules,
    base_state_dict,
    folded_adapter,
    load_adapter,
    load_adapter_state_dict,
    merge,
    remove,
    rules_of,
    save_adapter,
)
from surgery.rules import (
    AdaptionRule,
    IA3Rule,
    LoraRule,
    MultitaskPromptRule,
    PrefixRule,
    PromptRule,
    TokensRule,
    TrainRule,
    fit_prefix,
)
from surgery.rules.slots.positions import ShiftedRule
from surgery.testing import Snapshot, assert_reversible
from tests.support.conformance import SIZES, Row, build, in_peft, near, of_text

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers: Any = pytest.importorskip("transformers")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]  # PEFT's own words
IDS = torch.tensor([[5, 3, 9, 2, 7, 11], [4, 8, 6, 2, 0, 0]])
TEXT = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def llama(kind: str = "ForCausalLM", **more: Any) -> Any:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.1, **more)
    return getattr(transformers, f"Llama{kind}")(config).eval()


def gpt2(kind: str = "LMHeadModel", **more: Any) -> Any:
    config = transformers.GPT2Config(**{**SIZES, "intermediate_size": None}, initializer_range=0.1, **more)
    return getattr(transformers, f"GPT2{kind}")(config).eval()


def bert(kind: str = "ForSequenceClassification", **more: Any) -> Any:
    config = transformers.BertConfig(**SIZES, initializer_range=0.1, **more)
    return getattr(transformers, f"Bert{kind}")(config).eval()


def written(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], name: str = "adapter_model.bin") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        from safetensors.torch import save_file

        save_file(tensors, folder / name)
    return folder


# Old files ------------------------------------------------------------------------------------------------------

COMMON: dict[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": "base", "inference_mode": True, "revision": None,
}  # fmt: skip
PROMPTED: dict[str, Any] = {
    **COMMON, "num_attention_heads": 4, "num_layers": 3, "num_transformer_submodules": 1, "num_virtual_tokens": 4,
    "token_dim": 32,
}  # fmt: skip
# As PEFT 0.5.0 wrote them: fewer fields, and no modules_to_save beside a task.
OLD: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "prompt": (
        "llama",
        {**PROMPTED, "peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT", "task_type": "CAUSAL_LM",
         "prompt_tuning_init_text": "is it so?", "tokenizer_name_or_path": "base"},
        {"prompt_embeddings": (4, 32)},
    ),
    "p-tuning": (
        "gpt2",
        {**PROMPTED, "peft_type": "P_TUNING", "encoder_dropout": 0.0, "encoder_hidden_size": 128,
         "encoder_num_layers": 2, "encoder_reparameterization_type": "MLP", "task_type": "CAUSAL_LM"},
        {"prompt_embeddings": (4, 32)},
    ),
    "prefix": (
        "llama",
        {**PROMPTED, "peft_type": "PREFIX_TUNING", "encoder_hidden_size": 16, "prefix_projection": False,
         "task_type": "CAUSAL_LM", "num_attention_heads": 2, "token_dim": 16},
        {"prompt_embeddings": (4, 96)},
    ),
    "a classifier": (
        "bert",
        {**PROMPTED, "peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None,
         "tokenizer_name_or_path": None, "task_type": "SEQ_CLS"},
        {"prompt_embeddings": (4, 32), "base_model.classifier.weight": (2, 32), "base_model.classifier.bias": (2,)},
    ),
    "LoRA with a classifier": (
        "bert",
        {**COMMON, "peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none",
         "fan_in_fan_out": False, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
         "modules_to_save": None, "target_modules": ["query"], "task_type": "SEQ_CLS"},
        {f"base_model.model.bert.encoder.layer.{i}.attention.self.query.lora_{which}.weight": shape
         for i in range(3) for which, shape in (("A", (2, 32)), ("B", (32, 2)))}
        | {"base_model.model.classifier.weight": (2, 32), "base_model.model.classifier.bias": (2,)},
    ),
    "adaption": (
        "llama",
        {**COMMON, "peft_type": "ADAPTION_PROMPT", "adapter_layers": 2, "adapter_len": 3, "target_modules": "self_attn",
         "task_type": "CAUSAL_LM"},
        {f"base_model.model.model.layers.{i}.self_attn.adaption_{name}": shape
         for i in (1, 2) for name, shape in (("prompt", (1, 3, 32)), ("gate", (1,)))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_old_files(name: str, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft", reason="compares with PEFT")
    kind, config, shapes = OLD[name]
    model = {"llama": llama, "gpt2": gpt2, "bert": bert}[kind]()
    folder = written(tmp_path, config, {key: torch.randn(shape) * 0.3 for key, shape in shapes.items()})
    plain = model(**TEXT).logits
    load_adapter(copied := copy.deepcopy(model), folder, example_inputs=TEXT if name == "prefix" else None)
    if name == "prompt":  # else PEFT asks the tokenizer, though it is past
        written(folder, config | {"prompt_tuning_init": "RANDOM"}, torch.load(folder / "adapter_model.bin"))
    theirs = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    expected = of_text(theirs(**TEXT).logits, plain)
    assert near(copied(**TEXT).logits, expected) and not near(plain, expected)


@pytest.mark.parametrize("name", ["prompt", "adaption"])
def test_the_least_configuration(name: str, tmp_path: Path) -> None:
    _, config, shapes = OLD[name]
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    kept = ("peft_type", "num_virtual_tokens", "adapter_len", "adapter_layers")
    load_adapter(whole := llama(), written(tmp_path / "whole", config, tensors))
    least = {key: value for key, value in config.items() if key in kept}
    load_adapter(model := copy.deepcopy(remove(copy.deepcopy(whole))), written(tmp_path / "least", least, tensors))
    assert torch.equal(model(**TEXT).logits, whole(**TEXT).logits)


# What each computes ---------------------------------------------------------------------------------------------


def test_an_adaption_prompt_is_computed_by_hand() -> None:
    """On one attention: its own output, and what its queries find in the prompt, through the output map."""
    model = llama("Model")
    attention = model.layers[0].self_attn
    x, (cos, sin) = torch.randn(2, 5, 32), model.rotary_emb(torch.randn(1), torch.arange(5)[None])
    plain = attention(x, position_embeddings=(cos, sin), attention_mask=None)[0]
    apply_rules(model, AdaptionRule("layers.0.self_attn", length=3))
    box = attention.adapters.default
    assert torch.equal(attention(x, position_embeddings=(cos, sin), attention_mask=None)[0], plain)
    with torch.no_grad():
        box.gate.fill_(1.5)
    query = attention.q_proj(x).view(2, 5, 4, 8)
    half = torch.cat([-query[..., 4:], query[..., :4]], -1)
    query = query * cos[:, :, None] + half * sin[:, :, None]
    key, value = (part(box.prompt).view(3, 2, 8) for part in (attention.k_proj, attention.v_proj))
    found = torch.empty(2, 5, 4, 8)
    for head in range(4):
        weights = (query[:, :, head] @ key[:, head // 2].t() / math.sqrt(8)).softmax(-1)
        found[:, :, head] = weights @ value[:, head // 2]
    expected = plain + 1.5 * found.flatten(2) @ attention.o_proj.weight.t()
    output = attention(x, position_embeddings=(cos, sin), attention_mask=None)[0]
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    output.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in (box.prompt, box.gate))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_an_adaption_prompt_beside_lora_and_copied(make: Any) -> None:
    model, name = make(), "attn" if make is gpt2 else "self_attn"
    rule = AdaptionRule(name, length=3, mapped=make is not gpt2, layers=[1, 2])
    assert_reversible(copy.deepcopy(model), [rule])
    apply_rules(model, rule)
    apply_rules(model, LoraRule("c_attn" if make is gpt2 else ["k_proj", "v_proj"], rank=2, init="random"), adapter="l")
    with torch.no_grad():
        for key, tensor in adapter_state_dict(model).items():
            if key.endswith("gate"):
                tensor.fill_(2.0)
    live = model(**TEXT).logits
    # LoRA's change of the maps holds for the prompt's keys and values: as in a base that has it in its weights.
    folded = copy.deepcopy(model)
    kept = {key: tensor.clone() for key, tensor in adapter_state_dict(folded).items()}
    remove(folded, "default")
    merge(folded)
    base = make()
    base.load_state_dict(base_state_dict(folded))
    apply_rules(base, rule)
    load_adapter_state_dict(base, kept)
    assert near(base(**TEXT).logits, live)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**TEXT).logits, live)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(**TEXT, **settings)
    assert torch.equal(cached, model.generate(**TEXT, **settings, use_cache=False))


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.k_proj(x).mT).softmax(-1) @ self.v_proj(x)


def test_where_an_adaption_prompt_can_not_go() -> None:
    for target, fields in (("mlp", {}), ("self_attn", {"mapped": False})):
        with pytest.raises(PlanError, match="can't go on this"):
            apply_rules(llama(), AdaptionRule(target, **fields))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="from a registry"):
        apply_rules(nn.Sequential(Maps()), AdaptionRule("0"))
    for fields in ({"length": 0}, {"mapped": 1}):
        with pytest.raises(RuleError):
            AdaptionRule("self_attn", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_classifiers_see_the_virtual_tokens(make: Any) -> None:
    """`whole`: the untouched classifier, called with the prompt before the text's embeddings."""
    model = make("ForSequenceClassification", num_labels=3)
    apply_rules(model, PromptRule(length=4, after=0, whole=True))
    base = remove(copy.deepcopy(model))
    prompt = next(iter(adapter_state_dict(model).values())).expand(2, -1, -1)
    embeds = torch.cat([prompt, base.get_input_embeddings()(IDS)], 1)
    mask = torch.cat([torch.ones(2, 4, dtype=torch.long), TEXT["attention_mask"]], 1)
    expected = base(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(model(**TEXT).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**TEXT).logits, expected)
    cut = apply_rules(make("ForSequenceClassification", num_labels=3), PromptRule(length=4, after=0))
    assert cut(**TEXT, output_hidden_states=True).hidden_states[-1].shape[1] == IDS.shape[1]
    assert model(**TEXT, output_hidden_states=True).hidden_states[-1].shape[1] == IDS.shape[1] + 4
    assert_reversible(base, [PromptRule(length=4, after=0, whole=True)])
    with pytest.raises(RuleError, match="whole"):
        PromptRule(whole=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["PromptTuning", "AdaptionPrompt"])
def test_generating_as_in_peft(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="compares with PEFT")
    fields = {"num_virtual_tokens": 4} if kind == "PromptTuning" else {"adapter_len": 3, "adapter_layers": 2}
    row = Row(kind, "llama", {**fields, "task_type": "CAUSAL_LM"})
    model: Any = build(row)[0]
    theirs = in_peft(row, model)
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inputs = {"input_ids": IDS[:1], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    assert torch.equal(model.generate(**inputs, **settings), theirs.generate(**inputs, **settings))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["PromptTuning", "AdaptionPrompt"])
def test_half_precision(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="compares with PEFT")
    fields = {"num_virtual_tokens": 4} if kind == "PromptTuning" else {"adapter_len": 3, "adapter_layers": 2}
    row = Row(kind, "gpt2", {**fields, "task_type": "CAUSAL_LM"})
    model, call = build(row)
    model: Any = model.to(dtype)
    theirs = in_peft(row, model)
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    expected, found = call(theirs), call(model)
    assert torch.equal(found, of_text(expected, found))


# Networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "lstm", "projection"])
def test_networks_are_left_out_where_pefts_format_is_asked_for(kind: str, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft", reason="compares with PEFT")
    model = llama()
    rule = PrefixRule(length=3, projection=8) if kind == "projection" else PromptRule(length=3, encoder=kind)  # type: ignore[arg-type]
    apply_rules(model, rule, example_inputs=TEXT)
    expected, names = model(**TEXT).logits, lambda folder: {file.name for file in folder.iterdir()}
    assert names(save_adapter(model, tmp_path / "auto")) == {"adapter.safetensors", "rules.json"}
    folder = save_adapter(model, tmp_path / "peft", format="peft")
    assert rules_of(model) == [rule]
    for saved, holds in ((tmp_path / "auto", rule), (folder, None)):
        load_adapter(other := remove(copy.deepcopy(model)), saved, example_inputs=TEXT)
        assert near(other(**TEXT).logits, expected) and (holds is None or rules_of(other) == [holds])
    theirs = peft.PeftModel.from_pretrained(remove(copy.deepcopy(model)), str(folder)).eval()
    assert near(of_text(theirs(**TEXT).logits, expected), expected)


def test_a_prompts_network_is_folded() -> None:
    model = apply_rules(llama(), PromptRule(length=3, encoder="lstm", encoder_size=4))
    rules, tensors = folded_adapter(model)
    expected = model(**TEXT).logits
    (key,) = tensors
    assert key == "model.adapters.prompt" and rules[0].encoder is None and tensors[key].shape == (3, 32)  # type: ignore[attr-defined]
    apply_rules(remove(model), rules)
    load_adapter_state_dict(model, tensors)
    assert near(model(**TEXT).logits, expected)


# Refused --------------------------------------------------------------------------------------------------------

P: dict[str, Any] = {**OLD["prompt"][1], "prompt_tuning_init": "RANDOM"}
TASKS: dict[str, Any] = {**P, "peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 2, "num_ranks": 1}
UNREAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "two parts of a decoder": (llama, P | {"num_transformer_submodules": 2}, "num_transformer_submodules='2'"),
    "no decoder": (llama, P | {"task_type": "SEQ_2_SEQ_LM"}, "task_type='SEQ_2_SEQ_LM'"),
    "a field of another release": (llama, P | {"shuffled": True}, "shuffled='True'"),
    "no length": (llama, P | {"num_virtual_tokens": None}, "length=0"),
    "no text": (lambda: nn.Linear(2, 2), P, "peft_type='PROMPT_TUNING'"),
    "another number of rows": (llama, P | {"num_virtual_tokens": 3}, r"does not give the \(3, 32\)"),
    "no task there": (llama, TASKS | {"task_type": "FEATURE_EXTRACTION"}, "task_type='FEATURE_EXTRACTION'"),
    "tasks in the decoder": (lambda: build(Row("", "t5"))[0], TASKS | {"task_type": "SEQ_2_SEQ_LM",
                             "num_transformer_submodules": 2}, "num_transformer_submodules='2'"),
    "another family": (bert, OLD["adaption"][1], "peft_type='ADAPTION_PROMPT'"),
    "too many layers": (llama, OLD["adaption"][1] | {"adapter_layers": 4}, "adapter_layers='4'"),
    "no number of layers": (llama, OLD["adaption"][1] | {"adapter_layers": "2"}, "adapter_layers='2'"),
    "a bias": (lambda: llama(attention_bias=True), OLD["adaption"][1], "target_modules='self_attn'"),
    "other positions": (lambda: build(Row("", "BloomForCausalLM"))[0], OLD["prefix"][1], "peft_type='PREFIX_TUNING'"),
    "a decoder's prefix": (llama, OLD["prefix"][1] | {"num_transformer_submodules": 2}, "num_transformer_submodules"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read(name: str, tmp_path: Path) -> None:
    make, config, told = UNREAD[name]
    tensors = {"prompt_embeddings": torch.randn(4, 32)}
    if "ADAPTION" in config["peft_type"]:
        tensors = {key: torch.randn(shape) for key, shape in OLD["adaption"][2].items()}
    if "MULTI" in config["peft_type"]:
        tensors |= {"prefix_task_cols": torch.randn(2, 4, 1), "prefix_task_rows": torch.randn(2, 1, 32)}
    model = make()
    before = Snapshot(model)
    with pytest.raises(LoadError, match=told):
        load_adapter(model, written(tmp_path, config, tensors, "adapter_model.safetensors"))
    assert not before.differences(model)


def test_a_window_that_a_text_can_outgrow(tmp_path: Path) -> None:
    config = {**OLD["prefix"][1], "num_attention_heads": 2}
    folder = written(tmp_path, config, {"prompt_embeddings": torch.randn(4, 96)})
    for window, read in ((8, False), (64, True), (None, True)):
        sizes = {**SIZES, "num_key_value_heads": 2, "sliding_window": window}
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes)).eval()
        if read:
            load_adapter(model, folder, example_inputs=TEXT)
        else:
            with pytest.raises(LoadError, match="leaves the window"):
                load_adapter(model, folder, example_inputs=TEXT)


UNWRITTEN: dict[str, tuple[Any, list[Any], str]] = {
    "after [CLS]": (bert, [PromptRule(length=2, whole=True)], "after=0"),
    "after a token": (llama, [PromptRule(length=2, after=1)], "after=0"),
    "a head that finds padding": (gpt2, [PromptRule(length=2)], ""),
    "a classifier that sees the text": (bert, [PromptRule(length=2, after=0)], "whole=True"),
    "outputs that are not cut": (llama, [PromptRule(length=2, whole=True)], "whole=False"),
    "a task of its own": (llama, [MultitaskPromptRule(length=2, tasks=2, task=1)], "names? none"),
    "features of tasks": (lambda: llama("Model"), [MultitaskPromptRule(length=2, tasks=2)], "names no task"),
    "a decoder of two": (lambda: build(Row("", "t5"))[0], [PromptRule("decoder", length=2)], "where the model takes"),
    "rows of the embedding": (llama, [PromptRule(length=2), TokensRule("embed_tokens", tokens=[3])], "no trainable"),
    "IA3 and rows": (llama, [IA3Rule("k_proj"), TokensRule("embed_tokens", tokens=[3])], "no trainable_token_indices"),
    "two methods": (llama, [PromptRule(length=2), LoraRule("q_proj")], "2 methods"),
    "not the last": (llama, [AdaptionRule("self_attn", layers=[0, 1])], "last attentions"),
    "unmapped": (gpt2, [AdaptionRule("attn")], "mapped=False"),
    "an output bias": (lambda: llama(attention_bias=True), [AdaptionRule("self_attn")], "output bias"),
    "a head beside": (llama, [AdaptionRule("self_attn"), TrainRule("lm_head")], "no modules_to_save"),
    "a gated prefix": (llama, [PrefixRule(gate=True)], "gate"),
    "a few layers": (llama, [PrefixRule(layers=[0])], "every layer"),
    "positions": (gpt2, [PrefixRule()], "shift='transformer.wpe'"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNWRITTEN)
def test_what_is_not_written(name: str, tmp_path: Path) -> None:
    make, rules, told = UNWRITTEN[name]
    if not told:
        make, told = (lambda: gpt2("ForSequenceClassification")), "whole=True"
    model = make()
    prefix = any(isinstance(rule, PrefixRule) for rule in rules)
    apply_rules(model, rules, example_inputs=TEXT if prefix else None)
    with pytest.raises(SurgeryError, match=told):
        save_adapter(model, tmp_path, format="peft")
    assert not list(tmp_path.iterdir())
    assert (save_adapter(model, tmp_path / "auto") / "rules.json").exists()


def test_a_head_is_written_once(tmp_path: Path) -> None:
    """PEFT wraps a classifier of several layers whole: its parts, which are trained here, are named by it alone."""
    config = transformers.RobertaConfig(**{**SIZES, "pad_token_id": 1, "bos_token_id": 0})
    model = transformers.RobertaForSequenceClassification(config).eval()
    apply_rules(model, [PromptRule(length=2, after=0, whole=True), TrainRule("classifier.dense")])
    folder = save_adapter(model, tmp_path, format="peft")
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    load_adapter(other := remove(copy.deepcopy(model)), folder)
    assert torch.equal(other(**TEXT).logits, model(**TEXT).logits)


# Shifted positions ----------------------------------------------------------------------------------------------


def test_a_prefix_that_shifts_positions_is_a_cache_before_the_text() -> None:
    """The untouched model, called with the prefix in its cache: positions, padding and steps of decoding follow."""
    model = gpt2()
    base = copy.deepcopy(model)
    apply_rules(model, PrefixRule(length=3, shift="transformer.wpe"), example_inputs=TEXT)
    held = adapter_state_dict(model)
    names = [[f"transformer.h.{i}.attn.adapters.{name}" for name in ("key", "value")] for i in range(3)]
    pairs = [tuple(held[name].expand(2, -1, -1, -1).clone() for name in both) for both in names]
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), TEXT["attention_mask"]], 1)
    cache = transformers.DynamicCache(pairs)
    expected = base(input_ids=IDS, attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(model(**TEXT).logits, expected)
    given = {**TEXT, "position_ids": torch.arange(6).expand(2, -1)}
    assert torch.equal(model(**given).logits, expected)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(**TEXT, **settings), model.generate(**TEXT, **settings, use_cache=False))
    assert torch.equal(pickle.loads(pickle.dumps(model))(**TEXT).logits, expected)
    assert torch.equal(remove(model)(**TEXT).logits, base(**TEXT).logits)
    assert_reversible(model, [PrefixRule(length=3, shift="transformer.wpe")], example_inputs=TEXT)


@pytest.mark.parametrize("padded", [slice(0, 0), slice(0, 2), slice(4, 6)], ids=["none", "left", "right"])
def test_a_mask_of_queries_and_keys_is_widened_as_that_of_the_text(padded: slice) -> None:
    model = apply_rules(llama(), PromptRule(length=3, init="random"))
    text, causal = torch.ones_like(IDS), torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    text[1, padded] = 0
    expected = model(input_ids=IDS, attention_mask=text).logits
    whole = causal & text[:, None, None].bool()
    floats = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float32).min)
    for mask in (whole, floats, *([causal] if bool(text.all()) else [])):
        assert torch.equal(model(input_ids=IDS, attention_mask=mask).logits, expected)
    whole[0, 0, 3, 1] = False  # which no mask of the text says
    with pytest.raises(SurgeryError, match="not what transformers makes of a 2-D one"):
        model(input_ids=IDS, attention_mask=whole)


def test_padding_keeps_its_row() -> None:
    embedding = nn.Sequential(nn.Embedding(9, 2, padding_idx=1))
    positions, table = torch.tensor([[2, 3, 1]]), embedding[0].weight  # type: ignore[union-attr]
    apply_rules(embedding, ShiftedRule("0", by=4))
    assert torch.equal(embedding(positions), table[torch.tensor([[6, 7, 1]])])  # type: ignore[index]


def test_positions_of_an_embedding_that_takes_them_by_name() -> None:
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32))
    embedding, mask = model.model.decoder.embed_positions, torch.ones(1, 3, dtype=torch.long)
    expected = embedding(mask, position_ids=torch.tensor([[-1, 4, 5]]))
    apply_rules(embedding, ShiftedRule(nn.Embedding, by=4))
    assert torch.equal(embedding(mask, position_ids=torch.tensor([[-1, 0, 1]])), expected)  # -1 is padding
    with pytest.raises(SurgeryError, match="can't shift the text's positions"):
        embedding(mask)


def test_a_text_becomes_a_prefix_that_shifts_positions() -> None:
    model, text, more = gpt2("Model"), IDS[:1, :3], IDS[:1, 3:]
    whole = model(torch.cat([text, more], 1)).last_hidden_state
    apply_rules(model, PrefixRule(length=3, shift="wpe"), example_inputs={"input_ids": text})
    fit_prefix(model, {"input_ids": text})
    torch.testing.assert_close(model(more).last_hidden_state, whole[:, 3:])


def test_what_can_not_be_shifted() -> None:
    with pytest.raises(RuleError, match="shift"):
        PrefixRule(shift=3)  # type: ignore[arg-type]
    for shift, told in (
        ("lm_head", "neither a plain nn.Embedding nor takes position_ids"),
        ("wpe2", "no module of that name"),
    ):
        with pytest.raises(PlanError, match=told):
            apply_rules(gpt2(), PrefixRule(length=2, shift=shift), example_inputs=TEXT)
