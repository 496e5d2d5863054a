"""HeadRule against models of transformers that are built with these labels, and against plain torch."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from surgery import (
    PlanError,
    RuleError,
    SurgeryError,
    adapter_state_dict,
    apply_rules,
    hotswap,
    load_adapter,
    load_adapter_state_dict,
    plan_rules,
    remove,
    rules_from_json,
    rules_to_json,
    save_adapter,
    summary,
)
from surgery.rules import HeadRule, LoraRule, TrainRule
from surgery.testing import Snapshot
from tests.support.built_models import build_model
from tests.support.families import FAMILIES

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IDS = torch.arange(6)[None] + 2
PIXELS = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

# Class → configuration, inputs, labels
CASES: dict[str, tuple[dict[str, Any], dict[str, Tensor], Tensor]] = {
    "BertForSequenceClassification": (TEXT, {"input_ids": IDS}, torch.tensor([3])),
    "BertForTokenClassification": (TEXT, {"input_ids": IDS}, torch.tensor([[0, 1, 2, 3, 4, 0]])),
    "RobertaForSequenceClassification": (TEXT, {"input_ids": IDS}, torch.tensor([3])),
    "LlamaForSequenceClassification": (
        {**SIZES, "vocab_size": 32, "pad_token_id": 0},
        {"input_ids": IDS},
        torch.tensor([4]),
    ),
    "GPT2ForTokenClassification": (
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        | {"attn_pdrop": 0.0, "classifier_dropout": 0.0},
        {"input_ids": IDS},
        torch.tensor([[0, 1, 2, 3, 4, 0]]),
    ),
    "ViTForImageClassification": (
        {**SIZES, "image_size": 16, "patch_size": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        {"pixel_values": PIXELS},
        torch.tensor([2]),
    ),
}


def build(name: str, **fields: Any) -> Any:
    return build_model(name, {**CASES[name][0], **fields})


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_model_that_is_built_with_these_labels(name: str) -> None:
    _, inputs, labels = CASES[name]
    model = build(name)
    before = Snapshot(model)
    assert plan_rules(model, HeadRule(labels=5)) and not before.differences(model)
    apply_rules(model, HeadRule(labels=5), freeze=False)
    plain = build(name, num_labels=5)
    plain.load_state_dict(model.state_dict())
    assert model.config.to_dict() == plain.config.to_dict() and str(model) == str(plain)
    optimizers = [torch.optim.SGD(item.parameters(), lr=0.1) for item in (model, plain)]
    for _ in range(2):
        losses = []
        for item, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(item(**inputs, labels=labels).loss)
            losses[-1].backward()
            optimizer.step()
        assert torch.equal(*losses)
    for key, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", CASES)
def test_removing_it_restores_everything(name: str) -> None:
    model = build(name)
    before, config, text = Snapshot(model), model.config, model.config.to_dict()
    apply_rules(model, [HeadRule(labels=["a", "b", "c"]), LoraRule("all-linear", rank=2)])
    assert model.config is not config and model.config.id2label == {0: "a", 1: "b", 2: "c"}
    remove(model)
    assert not before.differences(model) and model.config is config and config.to_dict() == text


def test_the_head_trains_is_saved_and_loads_on_the_base(tmp_path: Path) -> None:
    name = "RobertaForSequenceClassification"
    rules = [HeadRule(labels=5), LoraRule("query", rank=2, init="random")]
    assert rules_from_json(rules_to_json(rules)) == rules
    model = apply_rules(build(name), rules)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained[-2:] == ["classifier.out_proj.weight", "classifier.out_proj.bias"] and len(trained) == 6
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=torch.tensor([3])).loss.backward()
    optimizer.step()
    expected = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, expected)
        assert torch.equal(remove(other)(IDS).logits, build(name)(IDS).logits)
    save_adapter(model, tmp_path)
    state, random = torch.get_rng_state(), build(name)
    torch.set_rng_state(state)
    report = load_adapter(random, tmp_path)
    assert torch.equal(torch.get_rng_state(), state) and not report.base
    assert torch.equal(random(IDS).logits, expected) and random.config.num_labels == 5
    assert random.classifier.out_proj.weight.requires_grad and not random.classifier.dense.weight.requires_grad
    again = apply_rules(build(name), rules)
    load_adapter_state_dict(again, adapter_state_dict(model))
    assert torch.equal(again(IDS).logits, expected)


def test_tensors_that_do_not_fit_are_told(tmp_path: Path) -> None:
    model = apply_rules(build("BertForSequenceClassification"), HeadRule(labels=5))
    tensors = adapter_state_dict(model)
    assert sorted(tensors) == ["structure.0.classifier.bias", "structure.0.classifier.weight"]
    with pytest.raises(SurgeryError, match="structure.0.classifier.bias is missing"):
        load_adapter_state_dict(model, {"structure.0.classifier.weight": tensors["structure.0.classifier.weight"]})
    save_adapter(model, tmp_path)
    base = build("BertForSequenceClassification", num_labels=3)  # the head goes, so it may be another one
    load_adapter(base, tmp_path)
    assert base.classifier.out_features == 5


def test_other_adapters_stay_and_come_back() -> None:
    name = "BertForSequenceClassification"
    model = apply_rules(build(name), TrainRule("classifier"), adapter="first")
    with torch.no_grad():
        model.classifier.adapters.first.weight.add_(1.0)
    first = model(IDS).logits
    apply_rules(model, HeadRule(labels=4), adapter="second")
    assert model(IDS).logits.shape == (1, 4)
    apply_rules(model, LoraRule("classifier", rank=2, init="random"), adapter="third")
    with pytest.raises(SurgeryError, match="third"):
        remove(model, "second")
    remove(model, ["second", "third"])
    assert torch.equal(model(IDS).logits, first)


def test_two_heads_one_upon_the_other() -> None:
    model = build("BertForSequenceClassification")
    before = Snapshot(model)
    apply_rules(model, HeadRule(labels=4), adapter="a")
    head = model.classifier
    apply_rules(model, HeadRule(labels=6), adapter="b")
    with pytest.raises(SurgeryError, match="remove 'b' first"):
        remove(model, "a")
    remove(model, "b")
    assert model.classifier is head and head.weight.requires_grad and model.config.num_labels == 4
    remove(model)
    assert not before.differences(model)


def test_the_same_number_is_a_new_head() -> None:
    model = build("BertForSequenceClassification")
    old = model.classifier.weight.clone()
    apply_rules(model, HeadRule(labels=2))
    assert model.classifier.weight.shape == old.shape and not torch.equal(model.classifier.weight, old)
    assert model.classifier.weight.std() < 0.05  # the class draws with a deviation of 0.02


def test_the_loss_of_a_former_call_does_not_stay() -> None:
    model = build("BertForSequenceClassification", num_labels=1)
    model(IDS, labels=torch.tensor([0.5]))
    assert model.config.problem_type == "regression"
    apply_rules(model, HeadRule(labels=3))
    model(IDS, labels=torch.tensor([2]))
    assert model.config.problem_type == "single_label_classification"
    remove(model)
    assert model.config.problem_type == "regression"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 10
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.fc = nn.Linear(8, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_without_a_configuration(dtype: torch.dtype) -> None:
    model: Any = Net().to(dtype)
    before = Snapshot(model)
    apply_rules(model, HeadRule("fc", labels=3))
    assert (model.num_classes, model.fc.weight.shape, model.fc.bias) == (3, (3, 8), None)
    assert model.fc.weight.dtype == dtype and model.fc.weight.requires_grad and not model.body[0].weight.requires_grad
    remove(model)
    assert not before.differences(model) and model.num_classes == 10


def test_a_model_on_the_meta_device_is_planned() -> None:
    with torch.device("meta"):
        model = build("BertForSequenceClassification")
    plan = plan_rules(model, HeadRule(labels=5))
    assert plan and plan.trainable == 16 * 5 + 5 and "2 → 5 labels" in str(plan)
    assert apply_rules(model, HeadRule(labels=5)).classifier.weight.is_meta


def test_without_training() -> None:
    model = apply_rules(build("BertForSequenceClassification"), [HeadRule(labels=5, trainable=False)])
    assert model.bert.pooler.dense.weight.requires_grad  # nothing of the rule trains, so the base is not frozen
    model = apply_rules(
        build("BertForSequenceClassification"), [HeadRule(labels=5, trainable=False), LoraRule("query")]
    )
    assert not model.classifier.weight.requires_grad


def test_what_is_wrong_is_told() -> None:
    for labels in (0, -1, True, [], ["a", "a"], ["a", 1], "ab"):
        with pytest.raises(RuleError, match="labels"):
            HeadRule(labels=labels)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="does not have a head"):
        apply_rules(transformers.BertModel(transformers.BertConfig(**TEXT)), HeadRule(labels=3))
    with pytest.raises(PlanError, match="name the last Linear"):
        apply_rules(Net(), HeadRule(labels=3))
    with pytest.raises(PlanError, match="a ReLU is not a head"):
        apply_rules(Net(), HeadRule("body.1", labels=3))


def test_the_summary_counts_the_new_head() -> None:
    model = apply_rules(Net(), [HeadRule("fc", labels=3), LoraRule("body.0", rank=2)])
    counts = summary(model)
    assert counts.rows == (("default", "HeadRule", 1, 24, 24, "live"), ("default", "LoraRule", 1, 24, 24, "live"))
    assert (counts.added, counts.trainable) == (48, 48)


def test_a_head_is_loaded_on_a_base_without_values(tmp_path: Path) -> None:
    model = apply_rules(build("BertForSequenceClassification"), HeadRule(labels=5))
    save_adapter(model, tmp_path)
    with torch.device("meta"):
        base = build("BertForSequenceClassification")
    load_adapter(base, tmp_path)
    assert torch.equal(base.classifier.weight, model.classifier.weight) and base.classifier.weight.requires_grad


def test_hooks_of_other_parts_stay() -> None:
    torch.manual_seed(0)
    model = transformers.DetrForObjectDetection(FAMILIES["detr"].make().config).eval()
    before = Snapshot(model)
    apply_rules(model, HeadRule(labels=7))
    assert model.class_labels_classifier.out_features == 8  # with "no object"
    remove(model)
    assert not before.differences(model)


def test_a_hot_swap_brings_the_values_of_the_head(tmp_path: Path) -> None:
    rules = [HeadRule(labels=5), LoraRule("query", rank=2, init="random")]
    models = [apply_rules(build("BertForSequenceClassification"), rules) for _ in range(2)]
    for parameter in models[0].parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    save_adapter(models[0], tmp_path)
    head, expected = models[1].classifier.weight, models[0](IDS).logits
    assert not torch.equal(models[1](IDS).logits, expected)
    report = hotswap(models[1], "default", tmp_path)
    assert models[1].classifier.weight is head and torch.equal(models[1](IDS).logits, expected)
    assert "structure.0.classifier.weight" in report.loaded
    hotswap(models[1], "default", adapter_state_dict(models[0]))
    other = apply_rules(build("BertForSequenceClassification"), HeadRule(labels=4), adapter="other")
    with pytest.raises(SurgeryError, match="structure"):
        hotswap(other, "other", tmp_path)


def test_a_tied_head_is_declared_untied() -> None:
    """transformers ties the declared weights again when a model is resized, dispatched or loaded."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=True, **sizes)).eval()  # type: ignore[arg-type]
    config = model.config
    apply_rules(model, HeadRule("lm_head", labels=7))
    model.tie_weights()
    assert model.lm_head.weight.shape == (7, 16) and not model.config.tie_word_embeddings
    remove(model)
    assert model.config is config and config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
