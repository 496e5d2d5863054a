"""Virtual tokens and padding: a row of a padded batch has the numbers of the row alone, where a text's row has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from surgery import SiteError, apply_rules, remove, route, using
from surgery.rules import MultitaskPromptRule, PromptRule, task_of
from tests.support.prompts import (
    IDS,
    SMALL,
    N,
    adapted,
    box,
    host,
    in_peft,
    llama,
    logits,
    masks,
    mistral,
    plain,
    t5,
    take_over,
)

transformers: Any = pytest.importorskip("transformers")
# Rotations by other positions, and kernels for other lengths, round otherwise; a window that is off by one gives 0.1.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
SETTINGS: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def gemma3(window: int = 4) -> Any:
    config = transformers.Gemma3TextConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=window,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config)


MODELS: dict[str, Any] = {"llama": llama, "mistral": mistral, "gemma3": gemma3}


def rows_alone(model: Any, mask: Tensor, prompts: Tensor | None = None) -> list[Tensor]:
    """The untouched model's outputs, one row per call, with the prompt before the row's embeddings."""
    prompts = box(host(model)).prompt.expand(len(IDS), -1, -1) if prompts is None else prompts
    assert prompts is not None
    other, result = plain(model), []
    for row, real, prompt in zip(IDS, mask.bool(), prompts, strict=True):
        embeds = torch.cat([prompt, other.get_input_embeddings()(row[real])])[None]
        with torch.no_grad():
            result.append(other(inputs_embeds=embeds).logits[0, len(prompt) :])
    return result


def alike(actual: Tensor, expected: list[Tensor], mask: Tensor) -> None:
    for row, real, item in zip(actual, mask.bool(), expected, strict=True):
        torch.testing.assert_close(row[real], item, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_a_call_without_positions(name: str, side: str) -> None:
    model, mask = adapted(MODELS[name](attn_implementation="eager") if name != "gemma3" else gemma3()), masks(side)
    alike(logits(model, IDS, **mask), rows_alone(model, mask["attention_mask"]), mask["attention_mask"])
    positions = (mask["attention_mask"].cumsum(1) - 1).clamp_min(0)
    actual = logits(model, IDS, position_ids=positions, **mask)
    alike(actual, rows_alone(model, mask["attention_mask"]), mask["attention_mask"])
    cached = model(IDS[:, :4], attention_mask=mask["attention_mask"][:, :4]).past_key_values
    actual = logits(model, IDS[:, 4:], past_key_values=cached, **mask)
    left = mask["attention_mask"][:, 4:]
    expected = rows_alone(model, mask["attention_mask"])
    alike(actual, [item[len(item) - n :] for item, n in zip(expected, left.sum(1).tolist(), strict=True)], left)


def test_after_the_first_token() -> None:
    model, mask = adapted(mistral(), after=1), masks("left")["attention_mask"]
    other, actual = plain(model), logits(model, IDS, attention_mask=mask)
    for row, real, item in zip(IDS, mask.bool(), actual, strict=True):
        embeds = other.get_input_embeddings()(row[real])
        embeds = torch.cat([embeds[:1], box(host(model)).prompt, embeds[1:]])[None]
        with torch.no_grad():
            expected = other(inputs_embeds=embeds).logits[0]
        torch.testing.assert_close(item[real], torch.cat([expected[:1], expected[1 + N :]]), **CLOSE)


def test_an_encoders_padding_is_not_seen() -> None:
    model, mask = adapted(t5()), masks("left")["attention_mask"]
    for row in range(2):
        alone = IDS[row : row + 1, mask[row].bool()]
        expected = model.generate(alone, max_new_tokens=6, do_sample=False, num_beams=2)
        batch = model.generate(IDS, attention_mask=mask, max_new_tokens=6, do_sample=False, num_beams=2)
        assert batch[row, : expected.shape[1]].tolist() == expected[0].tolist()


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_tasks_and_several_adapters_in_one_batch(family: str) -> None:
    mask = masks("left")["attention_mask"]
    model = apply_rules(MODELS[family]().eval(), [MultitaskPromptRule(length=N, tasks=2)])
    params = box(host(model))
    with torch.no_grad():
        params.columns.normal_()
        params.rows.normal_()
    prompts = params.prompt * (params.columns @ params.rows)
    with task_of([1, 0]):
        alike(logits(model, IDS, attention_mask=mask), rows_alone(model, mask, prompts[[1, 0]].detach()), mask)
    remove(model)
    for name, length in (("a", 3), ("b", 5)):
        apply_rules(model, [PromptRule(length=length, encoder="mlp" if name == "b" else None)], adapter=name)
    with torch.no_grad(), route(model, ["a", "b"]):
        actual = model(IDS, attention_mask=mask).logits
    for row, name in enumerate("ab"):
        with using(model, name):
            torch.testing.assert_close(
                actual[row, mask[row].bool()], logits(model, IDS[row : row + 1, mask[row].bool()])[0], **CLOSE
            )


def test_a_text_for_a_model_of_images() -> None:
    """Gemma 3's outer model hands on masks that it made, one for each kind of layer: they are read back."""
    text = {**gemma3().config.to_dict(), "layer_types": ["sliding_attention", "full_attention"]}
    images = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**images, "image_size": 16, "patch_size": 8}, mm_tokens_per_image=4,
        image_token_index=19, boi_token_index=18, eoi_token_index=17, pad_token_id=0,
    )  # fmt: skip
    model = adapted(transformers.Gemma3ForConditionalGeneration(config))
    mask = masks("left")["attention_mask"]
    rows = [IDS[row : row + 1, mask[row].bool()] for row in range(2)]
    expected = torch.cat([model.generate(row, use_cache=False, **SETTINGS)[:, row.shape[1] :] for row in rows])
    for more in ({}, {"use_cache": False}):
        assert torch.equal(model.generate(IDS, attention_mask=mask, **more, **SETTINGS)[:, 6:], expected)
    with pytest.raises(SiteError, match="not what transformers makes"):
        model(IDS, token_type_ids=torch.tensor([[0, 0, 1, 1, 0, 0]] * 2))  # an image's tokens see each other


# Caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_cache_with_windows_has_room(family: str) -> None:
    """Four virtual tokens and eight of text under a window of 16, and on past the window."""
    text = torch.randint(3, 20, (2, 8))
    model = mistral() if family == "mistral" else gemma3(16)
    model.config.sliding_window = 16
    model = apply_rules(type(model)(model.config).eval(), [PromptRule(length=4)])
    settings = {**SETTINGS, "max_new_tokens": 16}
    expected = model.generate(text, use_cache=False, **settings)
    assert torch.equal(model.generate(text, **settings), expected)
    cache = transformers.StaticCache(config=model.config, max_cache_len=30)
    for _ in range(2):
        assert torch.equal(model.generate(text, past_key_values=cache, **settings), expected)
        cache.reset()
    small = transformers.StaticCache(config=model.config, max_cache_len=14)  # no window: text would be forgotten
    with pytest.raises(SiteError, match="room for 14 positions, and 15 are needed"):
        model.generate(text, past_key_values=small, **settings)


@pytest.mark.parametrize("family", MODELS)
def test_beams_and_samples_of_a_padded_batch(family: str) -> None:
    model, mask = adapted(MODELS[family]()), masks("left")["attention_mask"]
    for more in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        actual = model.generate(IDS, attention_mask=mask, **SETTINGS, **more)[:, 6:]
        rows = [IDS[row : row + 1, mask[row].bool()] for row in range(2)]
        expected = [model.generate(row, use_cache=False, **SETTINGS, **more)[:, row.shape[1] :] for row in rows]
        assert torch.equal(actual, torch.cat(expected))


@pytest.mark.parametrize("family", MODELS)
def test_chunks_of_nothing_but_padding(family: str) -> None:
    """A row whose first chunks are padding gets its virtual tokens once its text begins."""
    mask = masks("left")["attention_mask"]
    model = adapted(MODELS[family]())
    for ids, padding in ((IDS, mask), (IDS[:1], mask[:1])):
        expected = model.generate(ids, attention_mask=padding, **SETTINGS)
        for size in (1, 2):
            assert torch.equal(
                model.generate(ids, attention_mask=padding, prefill_chunk_size=size, **SETTINGS), expected
            )
    cache = transformers.StaticCache(config=model.config, max_cache_len=30)
    inputs = {"attention_mask": mask, "prefill_chunk_size": 2, "past_key_values": cache, **SETTINGS}
    if family == "mistral":  # of a static cache's masks only those of windows are there, none reaches the text
        with pytest.raises(SiteError, match="a window alone"):
            model.generate(IDS, **inputs)
    else:
        assert torch.equal(model.generate(IDS, **inputs), model.generate(IDS, attention_mask=mask, **SETTINGS))
    outputs = []
    for whole in (False, True):
        remove(model)
        adapted(model, whole=whole)
        with torch.no_grad():
            box(host(model)).prompt.fill_(0.5)
        cache = transformers.DynamicCache(config=model.config)
        calls = ((0, 2), (2, 3), (3, 6))
        outputs.append(
            [logits(model, IDS[:, a:b], attention_mask=mask[:, :b], past_key_values=cache) for a, b in calls]
        )
        assert [item.shape[1] for item in outputs[-1]] == [2 + whole * N, 1, 3]
    torch.testing.assert_close(outputs[0][2], outputs[1][2], **CLOSE)
    alike(torch.cat(outputs[0], 1), rows_alone(model, mask), mask)
    if family == "mistral":
        apply_rules(model, [PromptRule(length=2, whole=True)], adapter="second")
        with pytest.raises(SiteError, match="larger chunks"):
            model.generate(IDS, attention_mask=mask, prefill_chunk_size=1, **SETTINGS)


def test_compiled() -> None:
    model, mask = adapted(mistral()), masks("left")
    model.config.use_cache = False
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, IDS, **mask), logits(model, IDS, **mask), **CLOSE)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_pefts_rows_depend_on_their_padding() -> None:
    """PEFT puts the padding between the virtual tokens and the text, where distances count it, and windows."""
    for make in (llama, mistral):
        base = make().eval()
        theirs = in_peft(base, "PromptTuningConfig", "CAUSAL_LM")
        ours = apply_rules(base, [PromptRule(length=N)])
        take_over(theirs, ours)
        mask = masks("left")["attention_mask"]
        alone = logits(theirs, IDS[:1, 2:])[0, N:]
        assert (logits(theirs, IDS, attention_mask=mask)[0, N + 2 :] - alone).abs().max() > 0.01
        torch.testing.assert_close(logits(ours, IDS, attention_mask=mask)[0, 2:], alone, **CLOSE)
