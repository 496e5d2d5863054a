"""Prompts in an exported file's slot: virtual tokens of any number at run time, none included."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from surgery import LoadError, Rule, SiteError, SurgeryError, apply_rules, load_adapter, using
from surgery.onnx import OnnxRunner, convert_peft, export_adapter, export_onnx, import_adapter
from surgery.rules import LoraRule, MultitaskPromptRule, PromptRule, TrainRule
from tests.support import tiny
from tests.support.longer_prefix import longer, moved
from tests.support.peft_slots import check_peft, export_slots, peft_of, peft_on, quietly
from tests.support.sampling import LAYERS, onnx_cases
from tests.support.slots import Exported, adapted, check_slots, outputs, plain, same

transformers: Any = pytest.importorskip("transformers")

PROMPTS: dict[str, Any] = {
    "a": PromptRule(length=3),
    "b": [PromptRule(length=6, encoder="mlp"), LoraRule("all-linear", rank=2)],
    "c": MultitaskPromptRule(length=4, tasks=3, task=1),
}
SIZES: dict[str, Any] = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.2}


@pytest.mark.parametrize("name", onnx_cases(["bert", "llama", "t5"], "bert", "t5"))
def test_prompts_of_any_length(name: str, tmp_path: Path) -> None:
    model, inputs = moved(getattr(tiny, name)(LAYERS))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :2] = 0
    inputs["attention_mask"][1, -2:] = 0
    base = plain(model)
    file = Exported(adapted(model, PROMPTS), inputs, tmp_path)
    (slot,) = (slot for slot in file.manifest["slots"] if slot["rule"] == "prompt")
    assert slot["shape"][0] is None and slot["default"] == "empty" and not file.report.notices
    calls = [longer(inputs)]
    if name == "llama":
        calls.append({**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])})
    check(file, base, calls, len(base(**inputs).to_tuple()) if name == "t5" else None)
    comes_back(file, base, tmp_path)


def check(file: Exported, base: Any, others: list[Any], without: int | None) -> None:
    """Of an encoder-decoder the last output, its encoder's, gets longer: it can't be compared with the base's."""
    if without is None:
        return check_slots(file, base, others)
    for inputs in (file.inputs, *others):
        same(file.run(inputs), outputs(base, inputs))
        for name in PROMPTS:
            with using(file.model, name):
                same(file.run(inputs, file.tensors(name)), outputs(file.model, inputs))


def comes_back(file: Exported, base: Any, folder: Path) -> None:
    path = export_adapter(file.model, "a", file.report.path, folder / "a.onnx_adapter")
    load_adapter(base, import_adapter(path, file.report.path), "a")
    with using(file.model, "a"):
        same(outputs(base, file.inputs), outputs(file.model, file.inputs), 1e-6)


def test_positions_and_types_that_are_given(tmp_path: Path) -> None:
    model, inputs = moved(tiny.bert(LAYERS))
    ids = inputs["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    inputs["token_type_ids"][:, 3:] = 1
    inputs["position_ids"] = torch.arange(2, ids.shape[1] + 2).expand_as(ids).contiguous()
    base = plain(model)
    check_slots(
        Exported(adapted(model, {"a": PromptRule(length=3), "b": PromptRule(length=1)}), inputs, tmp_path), base
    )


@pytest.mark.parametrize("family", onnx_cases(["gpt2", "mistral, padded"], "mistral, padded"))
def test_a_decoder_goes_on_from_its_cache(family: str, tmp_path: Path) -> None:
    family, _, padded = family.partition(", ")
    model, inputs = getattr(tiny, family)(LAYERS)
    ids = inputs["input_ids"].repeat(2, 1)[:2, :6]
    with torch.no_grad():
        for parameter in model.eval().parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    adapted(model, {name: PROMPTS[name] for name in "ab"})
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if padded:  # with positions of its own a text may have padding on its left
        inputs["position_ids"] = torch.arange(6).expand_as(ids).contiguous()
    report = export_onnx(model, tmp_path / "m.onnx", inputs, adapters="slots", cache=True)
    assert report.parity is not None
    assert {comparison.adapter for comparison in report.parity.decoded} == {"base", "a", "b"}
    runner = OnnxRunner(report.path)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]) if padded else torch.ones_like(ids)
    for name in "ab":
        runner.load(name, export_adapter(model, name, report.path, tmp_path / f"{name}.onnx_adapter"))
        with using(model, name), torch.no_grad():
            wanted = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=7, do_sample=False)
        tokens = runner.generate({"input_ids": ids.numpy(), "attention_mask": mask.numpy()}, 7, adapter=name)
        assert tokens.tolist() == wanted.tolist()
    if not padded:
        by_hand(runner, model, ids)


def by_hand(runner: OnnxRunner, model: Any, ids: torch.Tensor) -> None:
    """Two calls, the second with the first one's cache, as with the live model: masks cover only the text."""
    with using(model, "a"), torch.no_grad():
        first = model(input_ids=ids[:, :4], use_cache=True)
        second = model(input_ids=ids[:, 4:], attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values)
    shapes = {name: runner.feeds.required[name].shape for name in runner.manifest.inputs if "past" in name}
    none = {name: np.zeros((2, *shape[1:2], 0, *shape[3:]), np.float32) for name, shape in shapes.items()}
    feeds = {"input_ids": ids[:, :4].numpy(), "attention_mask": np.ones((2, 4), np.int64), **none}
    outputs = runner.run(feeds, "a")
    past = {entry["past"]: outputs[entry["present"]] for entry in runner.manifest.cache}
    feeds = {"input_ids": ids[:, 4:].numpy(), "attention_mask": np.ones((2, 6), np.int64), **past}
    same([outputs["logits"], runner.run(feeds, "a")["logits"]], [first.logits.numpy(), second.logits.numpy()])


def llama_with_a_prompt() -> tuple[Any, dict[str, Any]]:
    model, inputs = tiny.llama(LAYERS)
    ids = inputs["input_ids"]
    apply_rules(model.eval(), PromptRule(length=3), adapter="a")
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("how", onnx_cases(["slots", "constant"], "constant"))
def test_what_a_rule_notes_on_a_cache_is_not_an_output(how: Any, tmp_path: Path) -> None:
    """For a text of padding alone the cache also keeps the text; its layers and the logits are compared as always."""
    model, inputs = llama_with_a_prompt()
    report = export_onnx(model, tmp_path / "m.onnx", inputs, adapters=how)
    assert report.parity is not None
    names = [f"present.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    assert report.manifest["outputs"] == ["logits", *names]
    own = [
        comparison
        for comparison in report.parity.compared
        if comparison.adapter == "a" and comparison.values == "masks with an empty row"
    ]
    assert {comparison.output for comparison in own} == {"logits", *names} and all(comparison.ok for comparison in own)
    assert not report.notices and not report.parity.notices
    inputs["attention_mask"][0] = 0
    with torch.no_grad():
        wanted = model(**inputs)
    fed = {} if how == "constant" else {"adapter": "a"}
    runner = OnnxRunner(report.path)
    if fed:
        runner.load("a", export_adapter(model, "a", report.path, tmp_path / "a.onnx_adapter"))
    outputs = runner.run({name: tensor.numpy() for name, tensor in inputs.items()}, **fed)
    layers = [part for layer in wanted.past_key_values.layers for part in (layer.keys, layer.values)]
    same(list(outputs.values()), [wanted.logits.numpy(), *(tensor.numpy() for tensor in layers)])


@pytest.mark.slow("GPT-2 goes on from its cache after a prompt")
def test_examples_with_a_cache(tmp_path: Path) -> None:
    """One that holds virtual tokens is refused; one without is traced, with more padding than new text, too."""
    model, inputs = llama_with_a_prompt()
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :5] = 0
    first = {"input_ids": inputs["input_ids"], "attention_mask": mask[:, :7], "use_cache": True}
    example = {"input_ids": inputs["input_ids"][:, :1], "attention_mask": mask}
    with torch.no_grad():
        example["past_key_values"] = model(**first).past_key_values
    with pytest.raises(SurgeryError, match="filled with an adapter's virtual tokens") as caught:
        export_onnx(model, tmp_path / "m.onnx", example, adapters="slots")
    assert caught.value.where == "past_key_values" and not list(tmp_path.iterdir())
    with torch.no_grad(), using(model, None):
        example["past_key_values"] = model(**first).past_key_values
    report = export_onnx(model, tmp_path / "m.onnx", example, adapters="slots")
    assert report.parity is not None and {comparison.adapter for comparison in report.parity.compared} == {"base", "a"}


def test_tokens_of_a_vision_model(tmp_path: Path) -> None:
    """VPT: the sequence gets longer from the named layer on."""
    model, inputs = tiny.vit()
    with torch.no_grad():
        for parameter in model.eval().parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    inputs = {name: torch.cat([value, value, value[:1]]) for name, value in inputs.items()}
    base = plain(model)
    rules = {name: PromptRule("embeddings", length=size, after=1) for name, size in (("a", 3), ("b", 5))}
    file = Exported(adapted(model, rules, inputs), inputs, tmp_path)
    assert [slot["free"] for slot in file.manifest["slots"]] == [[0]]
    with torch.no_grad():
        same(file.run(), outputs(base, inputs))
    for name in "ab":
        with using(file.model, name):
            same(file.run(inputs, file.tensors(name)), outputs(file.model, inputs))


def classifier() -> tuple[Any, dict[str, Any]]:
    config = transformers.GPT2Config(vocab_size=30, n_embd=32, n_layer=1, n_head=2, pad_token_id=0, use_cache=False)
    ids = tiny.ids() % 29 + 1
    ids[0, -2:] = 0
    return transformers.GPT2ForSequenceClassification(config).eval(), {
        "input_ids": ids,
        "attention_mask": (ids > 0) * 1,
    }


def roberta() -> tuple[Any, dict[str, Any]]:
    model = transformers.RobertaModel(transformers.RobertaConfig(**SIZES, pad_token_id=1)).eval()
    return model, {"input_ids": tiny.ids() % 27 + 3}


@pytest.mark.parametrize(("make", "rule"), [
    (classifier, PromptRule(length=2, whole=True)),
    (roberta, PromptRule(length=2)),
    (tiny.bert, MultitaskPromptRule(length=2, tasks=2)),
])  # fmt: skip
def test_what_needs_the_ids_is_no_slot(make: Any, rule: Rule, tmp_path: Path) -> None:
    """Without virtual tokens the text would no longer be the base's."""
    model, inputs = make()
    apply_rules(model.eval(), [rule, LoraRule("all-linear", rank=2)])
    with pytest.raises(SurgeryError, match="not every rule can be a slot") as caught:
        export_onnx(model, tmp_path / "m.onnx", inputs, adapters="slots", strict=True)
    assert "token ids" in str(caught.value) or "names its task" in str(caught.value)


def test_prompts_that_stand_elsewhere(tmp_path: Path) -> None:
    model, inputs = moved(tiny.bert(LAYERS))
    rules = {"a": PromptRule(length=2, after=0), "b": PromptRule(length=2, after=2)}
    file = Exported(adapted(plain(model), {"a": rules["a"]}), inputs, tmp_path)
    with pytest.raises(SiteError, match="stand elsewhere"):
        file.tensors("b", adapted(plain(model), {"b": rules["b"]}))


# PEFT's checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", onnx_cases(["PromptTuningConfig", "PromptEncoderConfig"], "PromptEncoderConfig"))
def test_prompts_of_pefts_checkpoints(method: str, tmp_path: Path) -> None:
    peft = peft_of()
    config = transformers.LlamaConfig(**SIZES, use_cache=False)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 30, (3, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    file = export_slots(model, PromptRule(length=2, after=0), inputs, tmp_path)
    peft_config = getattr(peft, method)(num_virtual_tokens=4, task_type="CAUSAL_LM")
    peft_model = peft_on(copy.deepcopy(model), peft_config, tmp_path / "peft")
    runner = OnnxRunner(file)
    runner.load("a", convert_peft(tmp_path / "peft", file, tmp_path / "a.onnx_adapter"))
    with torch.no_grad(), quietly():
        wanted = peft_model(**inputs).logits[:, 4:].numpy()
    feeds = {name: value.numpy() for name, value in inputs.items()}
    assert np.abs(runner.run(feeds)["logits"] - wanted).max() > 1e-2
    np.testing.assert_allclose(runner.run(feeds, "a")["logits"], wanted, atol=2e-4, rtol=1e-3)


@pytest.mark.slow("other prompts of PEFT's checkpoints, and classifiers' heads, are exported")
@pytest.mark.filterwarnings("ignore")
def test_a_classifiers_prompt_of_pefts(tmp_path: Path) -> None:
    """PEFT's classifiers see the virtual tokens, and its checkpoint has their head."""
    peft = peft_of()
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()
    ids = torch.randint(1, 30, (3, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rules = [PromptRule(length=2, after=0, whole=True), TrainRule("classifier")]
    file = export_slots(model, rules, inputs, tmp_path)
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS")
    check_peft(peft_on(copy.deepcopy(model), config, tmp_path / "peft"), file, inputs, tmp_path)
    other = export_slots(model, [PromptRule(length=2, after=0), TrainRule("classifier")], inputs, tmp_path)
    with pytest.raises(LoadError, match="PromptRule's `whole`"):
        convert_peft(tmp_path / "peft", other, tmp_path / "b.onnx_adapter")
