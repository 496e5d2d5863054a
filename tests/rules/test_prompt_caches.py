"""PromptRule: generation and caches, beside the untouched model called by hand with virtual tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from surgery import SiteError
from tests.support.near import assert_as
from tests.support.prompts import (
    CLOSE,
    DECODERS,
    IDS,
    N,
    adapted,
    box,
    by_hand,
    host,
    llama,
    logits,
    mamba,
    masks,
    ordered,
    plain,
    transformers,
)


@pytest.mark.parametrize("name", DECODERS)
def test_generating(name: str) -> None:
    model = adapted(DECODERS[name]())
    other = plain(model)
    embeds = torch.cat([box(host(model)).prompt.expand(2, -1, -1), other.get_input_embeddings()(IDS)], 1)
    for side in ("left", "none"):
        mask = masks(side).get("attention_mask", torch.ones_like(IDS))
        settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
        columns = ordered(mask)
        wide = {
            "inputs_embeds": embeds.gather(1, columns.unsqueeze(-1).expand(-1, -1, embeds.shape[-1])),
            "attention_mask": torch.cat([mask.new_ones(2, N), mask], 1).gather(1, columns),
        }
        for more in ({"use_cache": False}, {"use_cache": True}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False}):
            actual = model.generate(IDS, attention_mask=mask, **settings, **more)
            expected = other.generate(**wide, **settings, **more)
            assert torch.equal(actual[:, 6:], expected), (side, more)


def test_a_cache_in_pieces_cropped_and_reused() -> None:
    model = adapted(llama())
    whole = logits(model, IDS)
    cache = transformers.DynamicCache(config=model.config)
    parts = [logits(model, IDS[:, a:b], past_key_values=cache) for a, b in ((0, 2), (2, 5), (5, 6))]
    assert_as(torch.cat(parts, 1), whole, model, 2e-6, IDS)
    assert cache.get_seq_length() == 6 + N
    cache.crop(-3)
    mask = torch.ones_like(IDS)
    actual = logits(model, IDS[:, 3:], past_key_values=cache, attention_mask=mask)
    assert_as(actual, whole[:, 3:], model, 2e-6, IDS)
    again = copy.deepcopy(cache)
    again.crop(-1)
    assert_as(logits(model, IDS[:, 5:], past_key_values=again), whole[:, 5:], model, 2e-6, IDS)
    cache.crop(-(6 + N))
    assert_as(logits(model, IDS, past_key_values=cache), whole, model, 2e-6, IDS)


def test_assisted_and_sampled_generation() -> None:
    model = adapted(llama())
    helper = adapted(llama())
    settings = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(IDS[:1], do_sample=False, **settings)
    assert torch.equal(model.generate(IDS[:1], do_sample=False, assistant_model=llama().eval(), **settings), expected)
    with pytest.raises(SiteError, match="position_ids end at"):  # transformers crops a helper's cache by its length
        model.generate(IDS[:1], do_sample=False, assistant_model=helper, **settings)
    assert torch.equal(model.generate(IDS[:1], do_sample=False, prompt_lookup_num_tokens=2, **settings), expected)
    assert torch.equal(model.generate(IDS[:1], do_sample=False, prefill_chunk_size=2, **settings), expected)
    draws = []
    for cache in (True, False):
        torch.manual_seed(3)
        draws.append(model.generate(IDS, do_sample=True, use_cache=cache, num_return_sequences=2, **settings))
    assert torch.equal(*draws)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_static_cache(name: str, side: str) -> None:
    model = adapted(DECODERS[name]())
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **masks(side)}
    expected = model.generate(IDS, **settings)
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    assert torch.equal(model.generate(IDS, past_key_values=cache, **settings), expected)
    cache.reset()
    assert torch.equal(model.generate(IDS, past_key_values=cache, **settings), expected)
    with pytest.raises(SiteError, match="room for"):
        model.generate(IDS, cache_implementation="static", **settings)


def test_a_state_space_model_takes_them_once() -> None:
    model = adapted(mamba())
    torch.testing.assert_close(logits(model, IDS), by_hand(model, IDS).logits[:, N:], **CLOSE)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached, not_cached = (model.generate(IDS, use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached, not_cached)


def test_a_cache_filled_without_them_is_refused() -> None:
    model = llama().eval()
    cache = model(IDS).past_key_values
    adapted(model)
    with pytest.raises(SiteError, match="filled without the virtual tokens"):
        model(IDS, past_key_values=cache)


def test_going_on_from_a_filled_cache() -> None:
    """transformers takes the cache's length for the text's: the new tokens alone, with the mask of all, are right."""
    model = adapted(llama())
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    expected = model.generate(IDS, attention_mask=mask, **settings)[:, 6:]
    for start, more in ((IDS, {}), (IDS, masks("left"))):
        cache = model(IDS[:, :4], attention_mask=more.get("attention_mask", mask)[:, :4]).past_key_values
        with pytest.raises(SiteError, match="as text|position_ids end at"):
            model.generate(start, past_key_values=cache, **{"attention_mask": mask, **more}, **settings)
    cache = model(IDS[:, :4]).past_key_values
    assert torch.equal(
        model.generate(IDS[:, 4:], past_key_values=cache, attention_mask=mask, **settings)[:, 2:], expected
    )
    with pytest.raises(SiteError, match="give an attention_mask"):
        bloom = adapted(
            transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=20, hidden_size=32, n_head=4))
        )
        bloom(IDS, past_key_values=bloom(IDS).past_key_values)
