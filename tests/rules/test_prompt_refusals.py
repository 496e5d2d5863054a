"""PromptRule: calls and models that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from surgery import PlanError, RuleError, SiteError, apply_rules
from surgery.rules import MultitaskPromptRule, PromptRule
from surgery.testing import Snapshot
from tests.support.prompts import IDS, SMALL, N, adapted, llama, transformers


def test_refused_calls() -> None:
    model = adapted(llama())
    four = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    four[:, :, 4, 1] = False  # no mask of the text's tokens says so
    calls: list[tuple[str, dict[str, Any]]] = [
        ("a 2-D mask", {"attention_mask": four}),
        ("a 2-D mask", {"attention_mask": {"full_attention": four}}),
        ("packed", {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)}),
        ("called with cu_seq_lens_q", {"cu_seq_lens_q": torch.tensor([0, 3, 6])}),
    ]
    for words, more in calls:
        with pytest.raises(SiteError, match=words):
            model(IDS, **more)
    with pytest.raises(SiteError, match="position_ids end at"):
        cache = model(IDS).past_key_values
        model(IDS[:, :1], past_key_values=cache, position_ids=torch.tensor([[6 + N]]))
    with pytest.raises(SiteError, match="fewer than after=8"):
        adapted(llama(), after=8)(IDS)


def test_refused_models() -> None:
    with pytest.raises(PlanError, match="the mask and the positions would not follow"):
        apply_rules(llama(), [PromptRule("embed_tokens")])
    with pytest.raises(PlanError, match="nothing to do"):
        apply_rules(nn.Sequential(nn.Linear(4, 4)), [PromptRule()])
    with pytest.raises(PlanError, match="how many of its tokens stay first"):
        apply_rules(nn.Sequential(nn.Linear(4, 4)), [PromptRule("0")])
    with pytest.raises(PlanError, match="no embedding of tokens"):
        apply_rules(nn.Sequential(nn.Linear(4, 4)), [PromptRule("0", init="vocab")])

    class Scaled(transformers.LlamaModel):  # as older models: only ids are scaled
        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):  # type: ignore[override]
            if inputs_embeds is None:
                inputs_embeds = self.embed_tokens(input_ids) * 3
            return super().forward(attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)

    model = Scaled(llama().config)
    before = Snapshot(model)
    with pytest.raises(PlanError, match="something else than for the ids"):
        apply_rules(model, [PromptRule()])
    assert before.differences(model) == []
    canine = transformers.CanineModel(transformers.CanineConfig(**{**SMALL, "num_hidden_layers": 1}))
    with pytest.raises(PlanError, match="does not tell its embedding"):
        apply_rules(canine, [PromptRule()])
    wrong: list[dict[str, Any]] = [
        {"length": 0}, {"init": "zero"}, {"init": "text"}, {"text_ids": [1]}, {"encoder": "gru"}, {"after": -1},
        {"encoder_dropout": 1.0}, {"encoder_layers": 0}, {"encoder_size": 0}, {"text_ids": ["a"], "init": "text"},
    ]  # fmt: skip
    for bad in wrong:
        with pytest.raises(RuleError):
            PromptRule(**bad)
    for bad in ({"tasks": 0}, {"ranks": 0}, {"tasks": 2, "task": 2}, {"encoder": "mlp"}):
        with pytest.raises(RuleError):
            MultitaskPromptRule(**bad)  # type: ignore[arg-type]
