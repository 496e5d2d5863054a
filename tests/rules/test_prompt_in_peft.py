"""PromptRule and MultitaskPromptRule beside PEFT's prompt tuning and p-tuning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from surgery import apply_rules
from surgery.rules import MultitaskPromptRule, PromptRule
from tests.support.prompts import (
    CLOSE,
    DECODERS,
    IDS,
    TEXTS,
    N,
    bert_sequences,
    by_hand,
    gpt2,
    in_peft,
    logits,
    masks,
    opt,
    t5,
    take_over,
    transformers,
)

ENCODINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("PromptTuningConfig", {}, {}),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 12}, {"encoder": "mlp", "encoder_size": 12}),
    "lstm": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2},
        {"encoder": "lstm", "encoder_size": 12},
    ),
}


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bert", "bert_sequences"])
def test_given_the_same_tensors_it_is_pefts(name: str, encoding: str) -> None:
    # PEFT makes prompts as wide as the hidden states; OPT's embeddings may be narrower, and then it fails.
    model = opt(32) if name == "opt" else {**TEXTS, "bert_sequences": bert_sequences}[name]()
    model = model.eval()
    task = "CAUSAL_LM" if name in DECODERS else "TOKEN_CLS" if name == "bert" else "SEQ_CLS"
    kind, peft_fields, fields = ENCODINGS[encoding]
    theirs = in_peft(model, kind, task, **peft_fields)
    ours = apply_rules(model, [PromptRule(length=N, after=0, **fields)])
    take_over(theirs, ours)
    for side in ("none", "right"):
        inputs = {"input_ids": IDS, **masks(side)}
        expected, actual = logits(theirs, **inputs), logits(ours, **inputs)
        expected = expected if task == "SEQ_CLS" else expected[:, N:]  # PEFT's are as long as what went in
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_losses_and_generation_beside_peft(name: str) -> None:
    model = DECODERS[name]().eval()
    theirs = in_peft(model, "PromptTuningConfig", "CAUSAL_LM")
    ours = apply_rules(model, [PromptRule(length=N)])
    take_over(theirs, ours)
    labels = IDS.clone()
    # PEFT's last virtual token is asked for the text's first one, too: in ours the text is asked for its own alone.
    assert (theirs(IDS, labels=labels).loss - ours(IDS, labels=labels).loss).abs() > 1e-4
    labels[:, 0] = -100
    torch.testing.assert_close(ours(IDS, labels=labels).loss, theirs(IDS, labels=labels).loss, **CLOSE)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(ours.generate(**inputs, **settings), theirs.generate(**inputs, **settings))


@pytest.mark.filterwarnings("ignore")
def test_encoder_decoders_beside_peft() -> None:
    model = t5().eval()
    theirs = in_peft(model, "PromptTuningConfig", "SEQ_2_SEQ_LM", num_transformer_submodules=1)
    ours = apply_rules(model, [PromptRule(length=N)])
    take_over(theirs, ours)
    inputs = {"input_ids": IDS, **masks("right")}
    expected, actual = theirs(**inputs, labels=IDS), ours(**inputs, labels=IDS)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss, **CLOSE)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**inputs, **settings), theirs.generate(**inputs, **settings))


@pytest.mark.filterwarnings("ignore")
def test_tasks_beside_peft() -> None:
    model = gpt2().eval()
    theirs = in_peft(model, "MultitaskPromptTuningConfig", "CAUSAL_LM", num_tasks=3, num_ranks=2)
    ours = apply_rules(model, [MultitaskPromptRule(length=N, tasks=3, ranks=2)])
    take_over(theirs, ours)
    inputs = {"input_ids": IDS, "task_ids": torch.tensor([2, 0])}
    torch.testing.assert_close(logits(ours, **inputs), logits(theirs, **inputs)[:, N:], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_peft_drops_positions_and_token_types() -> None:
    model = gpt2().eval()
    theirs = in_peft(model, "PromptTuningConfig", "CAUSAL_LM")
    ours = apply_rules(model, [PromptRule(length=N)])
    take_over(theirs, ours)
    spread = torch.tensor([[0, 2, 4, 6, 8, 10]] * 2)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    expected = by_hand(
        ours, IDS, inputs["attention_mask"], position_ids=torch.cat([torch.arange(N).expand(2, -1), spread + N], 1)
    )
    torch.testing.assert_close(logits(ours, **inputs, position_ids=spread), expected.logits[:, N:], **CLOSE)
    assert torch.equal(logits(theirs, **inputs, position_ids=spread), logits(theirs, **inputs))


@pytest.mark.filterwarnings("ignore")
def test_peft_classifies_by_the_last_position_of_padded_texts() -> None:
    """PEFT passes embeddings on, so a head that looks for padding in token ids finds no padding."""
    config = copy.deepcopy(gpt2().config)
    config.num_labels = 3
    model = transformers.GPT2ForSequenceClassification(config).eval()
    theirs = in_peft(model, "PromptTuningConfig", "SEQ_CLS")
    ours = apply_rules(model, [PromptRule(length=N)])
    take_over(theirs, ours)
    ids = torch.tensor([[5, 3, 9, 2, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    short = {"input_ids": ids[:, :4], "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    torch.testing.assert_close(logits(ours, **inputs), logits(ours, **short), **CLOSE)
    assert (logits(theirs, **inputs) - logits(theirs, **short)).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_peft_fails_at_narrow_embeddings() -> None:
    with pytest.raises(RuntimeError, match="[Ss]izes of tensors"):
        in_peft(opt(24), "PromptTuningConfig", "CAUSAL_LM")(IDS)
