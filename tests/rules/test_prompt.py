"""PromptRule: the numbers of the untouched model called by hand with virtual tokens."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from surgery import PlanError, SiteError, apply_rules, remove
from surgery.rules import LoraRule, PromptRule
from tests.support.prompts import (
    BOTH,
    CLOSE,
    DECODERS,
    ENCODERS,
    IDS,
    N,
    adapted,
    alike,
    bert_sequences,
    bert_tokens,
    box,
    by_hand,
    gpt2,
    host,
    llama,
    logits,
    masks,
    ordered,
    plain,
    t5,
    text_of,
    transformers,
)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_the_untouched_one_with_more_embeddings(name: str, kind: str, side: str) -> None:
    model = adapted(DECODERS[name](attn_implementation=kind))
    if side == "left" and name != "gpt2":
        expected = text_of(by_hand(model, IDS, **masks(side), behind=True).logits, masks(side)["attention_mask"])
    else:  # to GPT-2 a text's positions are its columns, be they padding or not
        expected = by_hand(model, IDS, **masks(side)).logits[:, N:]
    actual = logits(model, IDS, **masks(side))
    assert actual.shape == (2, 6, 20)
    alike(actual, expected)
    with torch.no_grad():
        box(host(model)).prompt.mul_(-1)
    assert (logits(model, IDS, **masks(side)) - actual).abs().max() > 0.01


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_the_untouched_one_with_more_embeddings(name: str, side: str) -> None:
    model = adapted(ENCODERS[name](), after=0)
    if name == "roberta" and side == "left":
        with pytest.raises(SiteError, match="padded on the left"):
            model(IDS, **masks(side))
        return
    alike(logits(model, IDS, **masks(side)), by_hand(model, IDS, **masks(side)).logits[:, N:])


def test_positions_token_types_and_embeddings_that_the_call_gives() -> None:
    model = adapted(gpt2())
    spread = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    wide = torch.cat([torch.arange(N).expand(2, -1), spread + N], 1)
    expected = by_hand(model, IDS, mask, position_ids=wide).logits[:, N:]
    alike(
        *(
            (actual * mask.unsqueeze(-1))
            for actual in (logits(model, IDS, attention_mask=mask, position_ids=spread), expected)
        )
    )
    from_one = torch.arange(1, 7)[None]  # as some models count
    expected = by_hand(model, IDS, position_ids=torch.arange(1, 7 + N)[None]).logits[:, N:]
    alike(logits(model, IDS, position_ids=from_one), expected)
    embeds = model.get_input_embeddings()(IDS)
    assert torch.equal(logits(model, inputs_embeds=embeds), logits(model, IDS))
    model = adapted(bert_tokens())
    types = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    expected = by_hand(model, IDS, token_type_ids=torch.cat([types.new_zeros(2, N), types], 1)).logits[:, N:]
    alike(logits(model, IDS, token_type_ids=types), expected)
    for wrong in ({}, {"input_ids": IDS, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="input_ids"):
            model(**wrong)


def test_what_else_is_returned_has_the_texts_length() -> None:
    model = adapted(llama(attn_implementation="eager"))
    actual = model(IDS, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in actual.hidden_states] == [(2, 6, 32)] * 3
    assert [tuple(a.shape) for a in actual.attentions] == [(2, 4, 6, 6 + N)] * 2  # the virtual tokens are seen
    assert actual.past_key_values.get_seq_length() == 6 + N
    first = model(IDS, return_dict=False)[0]
    assert torch.equal(first, actual.logits)
    untouched = by_hand(model, IDS, output_hidden_states=True)
    assert all(torch.equal(a, b[:, N:]) for a, b in zip(actual.hidden_states, untouched.hidden_states, strict=True))


def test_a_pooler_reads_the_texts_first_token() -> None:
    model = adapted(bert_sequences())
    assert torch.equal(logits(model, IDS, **masks("right")), by_hand(model, IDS, after=1, **masks("right")).logits)
    first = adapted(bert_sequences(), after=0)
    assert torch.equal(logits(first, IDS, **masks("right")), by_hand(first, IDS, **masks("right")).logits)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        apply_rules(other, [LoraRule("query", rank=1)], adapter="more")  # recorded anew
        remove(other, "more")
        assert torch.equal(logits(other, IDS), logits(model, IDS))


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", BOTH)
def test_an_encoder_decoder_sees_the_encoders_virtual_tokens(name: str, side: str) -> None:
    model = adapted(BOTH[name]())
    behind = side == "left" and name == "t5"  # its positions are distances
    actual = model(input_ids=IDS, labels=IDS, **masks(side))
    expected = by_hand(model, IDS, labels=IDS, **masks(side), behind=behind)
    assert torch.equal(actual.logits, expected.logits) and torch.equal(actual.loss, expected.loss)
    assert actual.encoder_last_hidden_state.shape[1] == 6 + N
    settings = {"max_new_tokens": 6, "do_sample": False, **masks(side)}
    mask = settings.pop("attention_mask", torch.ones_like(IDS))
    prompt, other = box(host(model)).prompt, plain(model)
    embeds = torch.cat([prompt.expand(2, -1, -1), other.get_input_embeddings()(IDS)], 1)
    wide = torch.cat([mask.new_ones(2, N), mask], 1)
    if behind:
        embeds = embeds.gather(1, ordered(mask).unsqueeze(-1).expand(-1, -1, 32))
        wide = wide.gather(1, ordered(mask))
    for more in ({"use_cache": True}, {"use_cache": False}, {"num_beams": 3}):
        item = model.generate(IDS, attention_mask=mask, **settings, **more)
        assert torch.equal(item, other.generate(inputs_embeds=embeds, attention_mask=wide, **settings, **more))


def test_a_decoder_of_two_is_prompted_where_it_is_named() -> None:
    model = apply_rules(t5().eval(), [PromptRule("decoder", length=N)])
    other = plain(model)
    prompt = box(model.decoder).prompt.expand(2, -1, -1)
    embeds = torch.cat([prompt, other.get_input_embeddings()(IDS)], 1)
    with torch.no_grad():
        expected = other(input_ids=IDS, decoder_inputs_embeds=embeds).logits[:, N:]
    assert torch.equal(logits(model, input_ids=IDS, decoder_input_ids=IDS), expected)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        model.generate(IDS, use_cache=True, **settings), model.generate(IDS, use_cache=False, **settings)
    )


def test_virtual_tokens_of_an_image() -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4,
        num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    model: Any = transformers.ViTForImageClassification(config).eval()
    image = torch.randn(2, 3, 8, 8)
    before = logits(model, image)
    with pytest.raises(PlanError, match="give example_inputs"):
        apply_rules(model, [PromptRule("embeddings", length=N, after=1)])
    apply_rules(model, [PromptRule("embeddings", length=N, after=1)], example_inputs=image)
    actual = logits(model, image)
    prompt = box(model.vit.embeddings).prompt
    assert torch.equal(logits(copy.deepcopy(model), image), actual)
    remove(model)
    with torch.no_grad():
        hidden = model.vit.embeddings(image)
        hidden = torch.cat([hidden[:, :1], prompt.expand(2, -1, -1), hidden[:, 1:]], 1)
        for layer in model.vit.layers:
            hidden = layer(hidden, None)
        expected = model.classifier(model.vit.layernorm(hidden)[:, 0])
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert torch.equal(logits(model, image), before)
