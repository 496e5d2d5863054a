"""PromptRule: losses and gradients, initial values, networks behind the virtual tokens, tasks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import SiteError, apply_rules, remove, rules_of
from surgery.rules import LoraRule, MultitaskPromptRule, PromptRule, fold_prompts, task_of
from tests.support.prompts import (
    BOTH,
    CLOSE,
    DECODERS,
    IDS,
    TEXTS,
    N,
    adapted,
    bart,
    bert_tokens,
    box,
    by_hand,
    deberta,
    distilbert,
    gpt2,
    host,
    llama,
    logits,
    mamba,
    mistral,
    opt,
    plain,
    roberta,
    transformers,
)


@pytest.mark.parametrize("name", [*DECODERS, "bert", "t5"])
def test_the_loss_is_that_of_the_text(name: str) -> None:
    model = adapted({**TEXTS, **BOTH}[name]())
    labels = IDS % 3
    actual = model(input_ids=IDS, labels=labels).loss
    if name in DECODERS:
        wide = torch.cat([torch.full((2, N), -100), labels], 1)
        # the last virtual token predicts the text's first: not the text's own prediction, so it is left out here
        wide[:, N] = -100
        expected = by_hand(model, IDS, labels=wide).loss
    else:
        expected = F.cross_entropy(logits(model, input_ids=IDS, labels=labels).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(actual, expected, **CLOSE)
    actual.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if n.endswith("adapters.default.prompt")
    }


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = adapted({**TEXTS, **BOTH}[name](), encoder="mlp", encoder_size=8).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    tensors = [p for p in model.parameters() if p.requires_grad]
    assert len(tensors) == 7
    actual = []
    for checkpointing in (False, True):
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(input_ids=IDS, labels=IDS % 2).loss.backward()
        actual.append([tensor.grad.clone() for tensor in tensors])
    for item, other in zip(*actual, strict=True):
        assert item.abs().max() > 0
        torch.testing.assert_close(item, other, **CLOSE)


def test_a_trainers_steps(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    model = apply_rules(llama(), [MultitaskPromptRule(length=N, tasks=2, init="vocab"), LoraRule("q_proj", rank=1)])
    start = box(host(model)).prompt.detach().clone()
    data = [{"input_ids": IDS[i % 2], "labels": IDS[i % 2], "task_ids": torch.tensor(i % 2)} for i in range(8)]
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    transformers.Trainer(model, settings, train_dataset=data).train()
    assert not torch.equal(box(host(model)).prompt, start)


def test_they_start_as_rows_of_the_embedding() -> None:
    model = bart()
    embedding = model.get_input_embeddings()
    apply_rules(model, [PromptRule(length=N, init="text", text_ids=[7, 3])])
    assert torch.equal(box(host(model)).prompt, embedding(torch.tensor([7, 3, 7, 3, 7])))
    remove(model)
    torch.manual_seed(5)
    apply_rules(model, [PromptRule(length=N, init="vocab")])
    torch.manual_seed(5)
    assert torch.equal(box(host(model)).prompt, embedding(torch.randint(20, (N,))))
    remove(model)
    apply_rules(model, [PromptRule(length=2, init="text", text_ids=[7, 3, 4])])
    assert torch.equal(box(host(model)).prompt, embedding(torch.tensor([7, 3])))
    half = apply_rules(llama().to(torch.bfloat16), [PromptRule(length=2, init="vocab")])
    assert box(host(half)).prompt.dtype is torch.float32 and logits(half, IDS).dtype is torch.bfloat16


def test_text_tokens_as_a_prompt_are_that_text() -> None:
    """The promise behind it all: a prompt made of a text's embeddings is that text."""
    start = [3, 14, 15, 9, 2]
    before = torch.tensor([start, start])
    for make in (llama, mistral, gpt2, opt, mamba, bert_tokens, roberta, distilbert, deberta):
        model = make().eval()
        expected = logits(model, torch.cat([before, IDS], 1))[:, N:]
        apply_rules(model, [PromptRule(length=N, init="text", text_ids=start, after=0)])
        torch.testing.assert_close(logits(model, IDS), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_folding(kind: Any) -> None:
    model = apply_rules(
        gpt2().eval(), [PromptRule(length=N, encoder=kind, encoder_size=12), LoraRule("c_attn", rank=2)]
    )
    expected = logits(model, IDS)
    assert fold_prompts(model) is model
    assert list(box(host(model)).tensors()) == ["prompt"]
    assert rules_of(model) == [PromptRule(length=N, encoder_size=12), LoraRule("c_attn", rank=2)]
    torch.testing.assert_close(logits(model, IDS), expected, **CLOSE)
    with pytest.raises(Exception, match="nothing to fold"):
        fold_prompts(model)


def test_dropout_between_the_layers_of_an_lstm() -> None:
    model = adapted(llama(), encoder="lstm", encoder_dropout=0.5)
    assert torch.equal(logits(model, IDS), logits(model, IDS))
    model.train()
    assert not torch.equal(logits(model, IDS), logits(model, IDS))


def test_tasks() -> None:
    model = apply_rules(llama().eval(), [MultitaskPromptRule(length=N, tasks=3, ranks=2, task=1)])
    params = box(host(model))
    with torch.no_grad():
        params.columns.normal_()
        params.rows.normal_()
    scales = params.columns @ params.rows
    other, embeds = plain(model), model.get_input_embeddings()(IDS)

    def expected(tasks: list[int]) -> Tensor:
        with torch.no_grad():
            return other(inputs_embeds=torch.cat([params.prompt * scales[tasks], embeds], 1)).logits[:, N:]

    torch.testing.assert_close(logits(model, IDS), expected([1, 1]), **CLOSE)
    torch.testing.assert_close(logits(model, IDS, task_ids=torch.tensor([2, 0])), expected([2, 0]), **CLOSE)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with task_of([2, 0]):
        torch.testing.assert_close(logits(model, IDS), expected([2, 0]), **CLOSE)
        beams = model.generate(IDS, num_beams=2, **settings)
    alone = []
    for row, task in ((0, 2), (1, 0)):
        with task_of(task):
            alone.append(model.generate(IDS[row : row + 1], num_beams=2, **settings))
    assert torch.equal(beams, torch.cat(alone))
    with task_of([0, 1, 2]), pytest.raises(SiteError, match="3 tasks for 2 rows"):
        model(IDS)
    model = apply_rules(llama(), [MultitaskPromptRule(length=N, tasks=3)])
    with pytest.raises(SiteError, match="names no task"):
        model(IDS)
