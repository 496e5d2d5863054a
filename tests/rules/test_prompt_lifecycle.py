"""PromptRule: removal, copies, other rules beside it, compiled and exported models, data."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

from surgery import PlanError, apply_rules, merge, plan_rules, remove, rules_from_json, rules_to_json
from surgery.rules import LoraRule, MultitaskPromptRule, PrefixRule, PromptRule
from surgery.testing import Snapshot, assert_reversible
from tests.support.prompts import BOTH, CLOSE, IDS, TEXTS, N, adapted, box, host, llama, logits, masks, t5, transformers


@pytest.mark.parametrize("name", [*TEXTS, *BOTH])
def test_removal_is_exact_and_copies_work(name: str) -> None:
    model = {**TEXTS, **BOTH}[name]().eval()
    inputs = {"input_ids": IDS, "labels": IDS % 2, **masks("right")}
    before, expected = Snapshot(model), logits(model, **inputs)
    adapted(model)
    live = logits(model, **inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, **inputs), live)
        remove(other)
        assert torch.equal(logits(other, **inputs), expected)
    remove(model)
    assert before.differences(model) == []
    assert torch.equal(logits(model, **inputs), expected)
    assert_reversible(model, [PromptRule(length=N)], example_inputs=inputs)


def test_beside_other_rules_and_prompts() -> None:
    model = adapted(llama())
    item = logits(model, IDS)
    rules = [LoraRule(["q_proj"], rank=2, init="random"), PrefixRule(length=2), PromptRule(length=3)]
    apply_rules(model, rules, adapter="second", example_inputs={"input_ids": IDS})
    both = logits(model, IDS)
    assert (both - item).abs().max() > 1e-4
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **masks("left")}
    expected = model.generate(IDS, use_cache=False, **settings)
    assert torch.equal(model.generate(IDS, use_cache=True, **settings), expected)
    cache = transformers.StaticCache(config=model.config, max_cache_len=30)
    assert torch.equal(model.generate(IDS, past_key_values=cache, **settings), expected)
    with pytest.raises(PlanError, match="not a change of a weight"):
        merge(model)
    with pytest.raises(PlanError, match="the same `after`"):
        apply_rules(model, [PromptRule(length=3, after=1)], adapter="third")
    remove(model, "second")
    assert torch.equal(logits(model, IDS), item)
    first, second = box(host(model)).prompt, torch.randn(3, 32)
    apply_rules(model, [PromptRule(length=3)], adapter="second")
    with torch.no_grad():
        box(host(model), "second").prompt.copy_(second)
        embeds = torch.cat([second.expand(2, -1, -1), first.expand(2, -1, -1), model.get_input_embeddings()(IDS)], 1)
        actual = logits(model, IDS)
        expected = remove(model)(inputs_embeds=embeds).logits[:, N + 3 :]
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_compile_and_export() -> None:
    model = adapted(llama())
    model.config.use_cache = False
    expected = logits(model, IDS, **masks("left"))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, IDS, **masks("left")), expected, **CLOSE)
    model.config.use_cache = True
    with torch.no_grad():
        cache = compiled(IDS[:, :4]).past_key_values
    assert cache.get_seq_length() == 4 + N
    torch.testing.assert_close(logits(compiled, IDS[:, 4:], past_key_values=cache), logits(model, IDS)[:, 4:], **CLOSE)
    model.config.use_cache = False
    for strict in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # transformers' forwards set a context variable
            program = torch.export.export(model, (), {"input_ids": IDS, **masks("left")}, strict=strict)
        torch.testing.assert_close(logits(program.module(), input_ids=IDS, **masks("left")), expected, **CLOSE)
    torch._dynamo.reset()


def test_they_are_data() -> None:
    rules = [PromptRule("model", length=7, init="text", text_ids=[1, 2], encoder="lstm"), MultitaskPromptRule(tasks=3)]
    assert rules_from_json(rules_to_json(rules)) == rules
    plan = plan_rules(t5(), [PromptRule(length=4)])
    assert [(step.rule.name, step.path) for step in plan.steps] == [("prompt", "encoder"), ("prompt-memory", "decoder")]
