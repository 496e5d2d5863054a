"""PromptRule: the numbers of the untouched model called by hand with virtual tokens, in every kind of call."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import (
    PlanError,
    RuleError,
    SiteError,
    apply_rules,
    merge,
    plan_rules,
    remove,
    rules_from_json,
    rules_of,
    rules_to_json,
)
from surgery.rules import LoraRule, MultitaskPromptRule, PrefixRule, PromptRule, fold_prompts, task_of
from surgery.testing import Snapshot, assert_reversible
from tests.support.near import assert_as

transformers = pytest.importorskip("transformers")
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}
N = 5
IDS = torch.tensor([[5, 3, 9, 2, 7, 11], [4, 8, 6, 2, 12, 3]])
SMALL: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2, **more))


def mistral(**more: Any) -> Any:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4, **more)
    )


def gpt2(**more: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def opt(width: int = 24, **more: Any) -> Any:
    config = transformers.OPTConfig(
        vocab_size=20, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, init_std=0.3,
        max_position_embeddings=64, word_embed_proj_dim=width, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def mamba() -> Any:
    config = transformers.MambaConfig(vocab_size=20, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    return transformers.MambaForCausalLM(config)


def bert_tokens() -> Any:
    return transformers.BertForTokenClassification(transformers.BertConfig(**SMALL, num_labels=3))


def bert_sequences() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3))


def roberta() -> Any:
    config = {**SMALL, "pad_token_id": 1, "bos_token_id": 0}
    return transformers.RobertaForTokenClassification(transformers.RobertaConfig(**config, num_labels=3))


def distilbert() -> Any:
    config = transformers.DistilBertConfig(
        vocab_size=20, dim=32, hidden_dim=48, n_layers=2, n_heads=4, initializer_range=0.3, pad_token_id=0
    )
    return transformers.DistilBertForTokenClassification(config)


def deberta() -> Any:
    config = transformers.DebertaV2Config(
        **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True
    )
    return transformers.DebertaV2ForTokenClassification(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=20, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=0.5, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=20, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, init_std=0.3,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2, scale_embedding=True,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


DECODERS: dict[str, Callable[..., Any]] = {"llama": llama, "mistral": mistral, "gpt2": gpt2, "opt": opt}
ENCODERS: dict[str, Callable[..., Any]] = {
    "bert": bert_tokens, "roberta": roberta, "distilbert": distilbert, "deberta": deberta,
}  # fmt: skip
BOTH: dict[str, Callable[..., Any]] = {"t5": t5, "bart": bart}
TEXTS = {**DECODERS, **ENCODERS}


def host(model: nn.Module) -> Any:
    return next(module for module in model.modules() if "prompt" in getattr(box(module), "_parameters", {}))


def box(module: nn.Module, adapter: str = "default") -> Any:
    held = module._modules.get("adapters")
    return held._modules.get(adapter) if held is not None else None


def adapted(model: Any, **fields: Any) -> Any:
    return apply_rules(model.eval(), [PromptRule(length=N, **fields)])


def plain(model: Any) -> Any:
    return remove(copy.deepcopy(model))


def masks(side: str) -> dict[str, Any]:
    if side == "none":
        return {}
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    return {"attention_mask": mask.flip(1) if side == "right" else mask}


def by_hand(
    model: Any, ids: Tensor, attention_mask: Tensor | None = None, after: int = 0, behind: bool = False, **more: Any
) -> Any:
    """The untouched model, called with the prompt before (or among) its embeddings; not cut.

    `behind`: where the first row is padded on its left, its prompt stands behind that.
    """
    other = plain(model)
    prompt = box(host(model)).prompt.expand(len(ids), -1, -1)
    embeds = other.get_input_embeddings()(ids)
    if behind:
        assert attention_mask is not None and not after
        columns = ordered(attention_mask)
        more["attention_mask"] = torch.cat([attention_mask.new_ones(len(ids), N), attention_mask], 1).gather(1, columns)
        embeds = torch.cat([prompt, embeds], 1).gather(1, columns.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
        with torch.no_grad():
            return other(inputs_embeds=embeds, **more)
    if attention_mask is not None:
        ones = attention_mask.new_ones(len(ids), N)
        more["attention_mask"] = torch.cat([attention_mask[:, :after], ones, attention_mask[:, after:]], 1)
    with torch.no_grad():
        return other(inputs_embeds=torch.cat([embeds[:, :after], prompt, embeds[:, after:]], 1), **more)


def ordered(mask: Tensor) -> Tensor:
    """Of columns of the prompt and the text, each row's padding on the left first, then the prompt."""
    rows = []
    for row in mask.tolist():
        padding = (row + [1]).index(1)
        rows.append([*range(N, N + padding), *range(N), *range(N + padding, N + len(row))])
    return torch.tensor(rows)


def text_of(made: Tensor, mask: Tensor) -> Tensor:
    """What a model returns for `ordered` columns, at the text's."""
    columns = ordered(mask).argsort(1)[:, N:]
    return made.gather(1, columns.unsqueeze(-1).expand(-1, -1, made.shape[-1]))


def logits(model: Any, *args: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(*args, **inputs).logits


# The numbers ------------------------------------------------------------------------------------------------------


def alike(found: Tensor, expected: Tensor) -> None:
    """The head runs on the text's positions alone, by hand on all: a kernel for another shape rounds otherwise."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_the_untouched_one_with_more_embeddings(name: str, kind: str, side: str) -> None:
    model = adapted(DECODERS[name](attn_implementation=kind))
    if side == "left" and name != "gpt2":
        expected = text_of(by_hand(model, IDS, **masks(side), behind=True).logits, masks(side)["attention_mask"])
    else:  # to GPT-2 a text's positions are its columns, be they padding or not
        expected = by_hand(model, IDS, **masks(side)).logits[:, N:]
    found = logits(model, IDS, **masks(side))
    assert found.shape == (2, 6, 20)
    alike(found, expected)
    with torch.no_grad():
        box(host(model)).prompt.mul_(-1)
    assert (logits(model, IDS, **masks(side)) - found).abs().max() > 0.01


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
            (made * mask.unsqueeze(-1))
            for made in (logits(model, IDS, attention_mask=mask, position_ids=spread), expected)
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
    found = model(IDS, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in found.hidden_states] == [(2, 6, 32)] * 3
    assert [tuple(a.shape) for a in found.attentions] == [(2, 4, 6, 6 + N)] * 2  # the virtual tokens are seen
    assert found.past_key_values.get_seq_length() == 6 + N
    first = model(IDS, return_dict=False)[0]
    assert torch.equal(first, found.logits)
    untouched = by_hand(model, IDS, output_hidden_states=True)
    assert all(torch.equal(a, b[:, N:]) for a, b in zip(found.hidden_states, untouched.hidden_states, strict=True))


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
    found = model(input_ids=IDS, labels=IDS, **masks(side))
    expected = by_hand(model, IDS, labels=IDS, **masks(side), behind=behind)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert found.encoder_last_hidden_state.shape[1] == 6 + N
    settings = {"max_new_tokens": 6, "do_sample": False, **masks(side)}
    mask = settings.pop("attention_mask", torch.ones_like(IDS))
    prompt, other = box(host(model)).prompt, plain(model)
    embeds = torch.cat([prompt.expand(2, -1, -1), other.get_input_embeddings()(IDS)], 1)
    wide = torch.cat([mask.new_ones(2, N), mask], 1)
    if behind:
        embeds = embeds.gather(1, ordered(mask).unsqueeze(-1).expand(-1, -1, 32))
        wide = wide.gather(1, ordered(mask))
    for more in ({"use_cache": True}, {"use_cache": False}, {"num_beams": 3}):
        one = model.generate(IDS, attention_mask=mask, **settings, **more)
        assert torch.equal(one, other.generate(inputs_embeds=embeds, attention_mask=wide, **settings, **more))


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
    found = logits(model, image)
    prompt = box(model.vit.embeddings).prompt
    assert torch.equal(logits(copy.deepcopy(model), image), found)
    remove(model)
    with torch.no_grad():
        hidden = model.vit.embeddings(image)
        hidden = torch.cat([hidden[:, :1], prompt.expand(2, -1, -1), hidden[:, 1:]], 1)
        for layer in model.vit.layers:
            hidden = layer(hidden, None)
        expected = model.classifier(model.vit.layernorm(hidden)[:, 0])
    torch.testing.assert_close(found, expected, **CLOSE)
    assert torch.equal(logits(model, image), before)


# Caches -----------------------------------------------------------------------------------------------------------


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
            found = model.generate(IDS, attention_mask=mask, **settings, **more)
            expected = other.generate(**wide, **settings, **more)
            assert torch.equal(found[:, 6:], expected), (side, more)


def test_a_cache_in_pieces_cropped_and_reused() -> None:
    model = adapted(llama())
    whole = logits(model, IDS)
    cache = transformers.DynamicCache(config=model.config)
    parts = [logits(model, IDS[:, a:b], past_key_values=cache) for a, b in ((0, 2), (2, 5), (5, 6))]
    assert_as(torch.cat(parts, 1), whole, model, 2e-6, IDS)
    assert cache.get_seq_length() == 6 + N
    cache.crop(-3)
    mask = torch.ones_like(IDS)
    found = logits(model, IDS[:, 3:], past_key_values=cache, attention_mask=mask)
    assert_as(found, whole[:, 3:], model, 2e-6, IDS)
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


# Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DECODERS, "bert", "t5"])
def test_the_loss_is_that_of_the_text(name: str) -> None:
    model = adapted({**TEXTS, **BOTH}[name]())
    labels = IDS % 3
    found = model(input_ids=IDS, labels=labels).loss
    if name in DECODERS:
        wide = torch.cat([torch.full((2, N), -100), labels], 1)
        # the last virtual token predicts the text's first: not the text's own prediction, so it is left out here
        wide[:, N] = -100
        expected = by_hand(model, IDS, labels=wide).loss
    else:
        expected = F.cross_entropy(logits(model, input_ids=IDS, labels=labels).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(found, expected, **CLOSE)
    found.backward()
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
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(input_ids=IDS, labels=IDS % 2).loss.backward()
        found.append([tensor.grad.clone() for tensor in tensors])
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, **CLOSE)


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


# How they start, and networks behind them ---------------------------------------------------------------------------


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
    held = box(host(model))
    with torch.no_grad():
        held.columns.normal_()
        held.rows.normal_()
    scales = held.columns @ held.rows
    other, embeds = plain(model), model.get_input_embeddings()(IDS)

    def expected(tasks: list[int]) -> Tensor:
        with torch.no_grad():
            return other(inputs_embeds=torch.cat([held.prompt * scales[tasks], embeds], 1)).logits[:, N:]

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


# In company -------------------------------------------------------------------------------------------------------


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
    one = logits(model, IDS)
    rules = [LoraRule(["q_proj"], rank=2, init="random"), PrefixRule(length=2), PromptRule(length=3)]
    apply_rules(model, rules, adapter="second", example_inputs={"input_ids": IDS})
    both = logits(model, IDS)
    assert (both - one).abs().max() > 1e-4
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
    assert torch.equal(logits(model, IDS), one)
    first, second = box(host(model)).prompt, torch.randn(3, 32)
    apply_rules(model, [PromptRule(length=3)], adapter="second")
    with torch.no_grad():
        box(host(model), "second").prompt.copy_(second)
        embeds = torch.cat([second.expand(2, -1, -1), first.expand(2, -1, -1), model.get_input_embeddings()(IDS)], 1)
        found = logits(model, IDS)
        expected = remove(model)(inputs_embeds=embeds).logits[:, N + 3 :]
    torch.testing.assert_close(found, expected, **CLOSE)


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


# Refused ----------------------------------------------------------------------------------------------------------


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


def test_refused_calls() -> None:
    model = adapted(llama())
    four = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
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


def test_they_are_data() -> None:
    rules = [PromptRule("model", length=7, init="text", text_ids=[1, 2], encoder="lstm"), MultitaskPromptRule(tasks=3)]
    assert rules_from_json(rules_to_json(rules)) == rules
    plan = plan_rules(t5(), [PromptRule(length=4)])
    assert [(step.rule.name, step.path) for step in plan.steps] == [("prompt", "encoder"), ("prompt-memory", "decoder")]


# Beside PEFT ------------------------------------------------------------------------------------------------------


def in_peft(model: Any, kind: str, task: str, **fields: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft", reason="compares with PEFT")
        config = getattr(peft, kind)(task_type=task, num_virtual_tokens=N, **fields)
        made = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for tensor in made.prompt_encoder.parameters():
        nn.init.normal_(tensor)
    return made


def take_over(theirs: Any, ours: Any) -> None:
    """Give our prompt PEFT's tensors."""
    found = {
        name.replace("embedding.weight", "prompt").replace("_head.", "_").replace(".", "_"): tensor
        for name, tensor in theirs.prompt_encoder["default"].named_parameters()
    }
    found = {
        {"prefix_task_cols": "columns", "prefix_task_rows": "rows"}.get(name, name): t for name, t in found.items()
    }
    held = box(host(ours)).tensors()
    assert found.keys() == held.keys()
    with torch.no_grad():
        for name, tensor in held.items():
            assert tensor.shape == found[name].shape, name
            tensor.copy_(found[name])


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
    made = opt(32) if name == "opt" else {**TEXTS, "bert_sequences": bert_sequences}[name]()
    model = made.eval()
    task = "CAUSAL_LM" if name in DECODERS else "TOKEN_CLS" if name == "bert" else "SEQ_CLS"
    kind, peft_fields, fields = ENCODINGS[encoding]
    theirs = in_peft(model, kind, task, **peft_fields)
    ours = apply_rules(model, [PromptRule(length=N, after=0, **fields)])
    take_over(theirs, ours)
    for side in ("none", "right"):
        inputs = {"input_ids": IDS, **masks(side)}
        expected, found = logits(theirs, **inputs), logits(ours, **inputs)
        expected = expected if task == "SEQ_CLS" else expected[:, N:]  # PEFT's are as long as what went in
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


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
    expected, found = theirs(**inputs, labels=IDS), ours(**inputs, labels=IDS)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
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
    """A head that looks for padding in token ids finds none in PEFT, which hands on embeddings."""
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
