"""PrefixRule: the numbers of a plain attention with more keys and values, in every kind of call."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import PlanError, RuleError, SiteError, apply_rules, merge, remove, rules_from_json, rules_to_json
from surgery.rules import LoraRule, PrefixRule
from surgery.testing import Snapshot
from tests.support.near import assert_as

transformers = pytest.importorskip("transformers")
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 5e-6}  # sums of the same products in another order
IDS = torch.tensor([[5, 3, 9, 2, 7, 1], [4, 8, 6, 2, 1, 3]])


def llama(**more: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def mistral(**more: Any) -> Any:
    config = transformers.MistralConfig(
        vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=3, initializer_range=0.3, **more,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config)


def gpt2(**more: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, **more
    )
    return transformers.GPT2LMHeadModel(config)


def bert(**more: Any) -> Any:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        initializer_range=0.3, **more,
    )  # fmt: skip
    return transformers.BertModel(config)


MODELS: dict[str, Callable[..., Any]] = {"llama": llama, "mistral": mistral, "gpt2": gpt2, "bert": bert}


def plain(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Attention written out, with the prefix that the test left on the module."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.mT * kwargs["scaling"]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    params, beside = getattr(module, "test_prefix", None), 0.0
    if params is not None:
        before_key, before_value = (tensor.repeat_interleave(repeats, 0) for tensor in params[:2])
        more = query @ before_key.mT * kwargs["scaling"]
        if len(params) == 3:
            beside = params[2].tanh().view(-1, 1, 1) * (more.softmax(-1) @ before_value)
        else:
            scores, value = (
                torch.cat([more, scores], -1),
                torch.cat([before_value.expand(len(query), -1, -1, -1), value], -2),
            )
    return (scores.softmax(-1) @ value + beside).transpose(1, 2).contiguous(), None


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as attentions

    torch.manual_seed(0)
    attentions.register("plain_for_tests", plain)
    masks.register("plain_for_tests", masks["eager"])
    yield
    for registry in (attentions, masks):
        registry._global_mapping.pop("plain_for_tests", None)


def attentions_of(model: nn.Module) -> list[nn.Module]:
    actual = [module for module in model.modules() if isinstance(module, nn.Module) and "adapters" in module._modules]
    return [module for module in actual if "key" in box(module)._parameters]


def box(module: Any) -> Any:
    return module.adapters.default


def adapt(model: Any, **fields: Any) -> Any:
    """With prefixes moved from where they start."""
    apply_rules(model, [PrefixRule(length=5, **fields)], example_inputs={"input_ids": IDS})
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".adapters." in name:
                tensor.normal_()
    return model.eval()


def reference(model: nn.Module) -> Any:
    """The model without rules, its attention written out in this file."""
    other: Any = copy.deepcopy(model)
    prefixes = [
        [params[name].detach().clone() for name in ("key", "value", "gate") if name in params]
        for params in (box(module)._parameters for module in attentions_of(other))
    ]
    places = attentions_of(other)
    remove(other)
    for module, params in zip(places, prefixes, strict=True):
        module.test_prefix = params  # type: ignore[assignment]
    other.set_attn_implementation("plain_for_tests")
    return other


def masks(side: str) -> dict[str, Any]:
    if side == "none":
        return {}
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    return {"attention_mask": mask.flip(1) if side == "right" else mask}


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_attention_with_more_keys(name: str, kind: str, side: str, gate: bool) -> None:
    model = adapt(MODELS[name](attn_implementation=kind), gate=gate)
    assert len(attentions_of(model)) == 2
    inputs = {"input_ids": IDS, **masks(side)}
    expected, actual = logits(reference(model), **inputs), logits(model, **inputs)
    real = inputs["attention_mask"].bool() if side != "none" else torch.ones_like(IDS, dtype=torch.bool)
    assert_as(actual[real], expected[real], model, 5e-6, **inputs)
    with torch.no_grad():
        for module in attentions_of(model):
            box(module).value.add_(1.0)
    assert (logits(model, **inputs) - actual)[real].abs().max() > 0.01


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_generating_with_and_without_a_cache(name: str) -> None:
    model: Any = adapt(MODELS[name]())
    plain_model = reference(model)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **masks("left")}
    actual = [
        item.generate(IDS, use_cache=cache, **settings) for item in (model, plain_model) for cache in (True, False)
    ]
    assert all(torch.equal(actual[0], other) for other in actual[1:])
    beams = [item.generate(IDS, num_beams=3, **settings) for item in (model, plain_model)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("name", MODELS)
def test_removal_is_exact_and_copies_work(name: str) -> None:
    model = MODELS[name]().eval()
    before, expected = Snapshot(model), logits(model, input_ids=IDS)
    adapt(model)
    live = logits(model, input_ids=IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, input_ids=IDS), live)
        remove(other)
        assert torch.equal(logits(other, input_ids=IDS), expected)
    remove(model)
    assert before.differences(model) == []


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_reaches_every_tensor(name: str, reentrant: bool) -> None:
    model: Any = adapt(MODELS[name]()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    tensors = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert len(tensors) == 4
    actual = []
    for checkpointing in (False, True):
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        output = model(input_ids=IDS)
        hidden = output.logits if "logits" in output else output.last_hidden_state
        model.zero_grad()
        hidden.square().mean().backward()
        actual.append({name: tensor.grad.clone() for name, tensor in tensors.items()})
    for key, grad in actual[0].items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(actual[1][key], grad, **CLOSE)


def test_a_gate_changes_nothing_at_the_start() -> None:
    model = llama().eval()
    expected = logits(model, input_ids=IDS)
    apply_rules(model, [PrefixRule(gate=True)], example_inputs={"input_ids": IDS})
    assert torch.equal(logits(model, input_ids=IDS), expected)


def test_beside_lora_and_other_prefixes() -> None:
    model = adapt(llama())
    item = logits(model, input_ids=IDS)
    rules = [LoraRule(["q_proj", "v_proj"], rank=2, init="random"), PrefixRule(length=2, gate=True)]
    apply_rules(model, rules, adapter="second", example_inputs={"input_ids": IDS})
    assert (logits(model, input_ids=IDS) - item).abs().max() > 1e-4
    with pytest.raises(PlanError, match="not a change of a weight"):
        merge(model)
    remove(model, "second")
    assert torch.equal(logits(model, input_ids=IDS), item)
    apply_rules(model, [PrefixRule(length=3, init="zero")], adapter="third", example_inputs={"input_ids": IDS})
    two = logits(model, input_ids=IDS)
    remove(model, "default")
    assert (logits(model, input_ids=IDS) - two).abs().max() > 1e-4


def test_cross_attention_is_passed_over_unless_named() -> None:
    config = transformers.WhisperConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=4, max_source_positions=8,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(2, 4, 16), "decoder_input_ids": IDS}

    def places(*args: Any) -> list[str]:
        model = transformers.WhisperModel(config)
        apply_rules(model, [PrefixRule(*args, length=2)], example_inputs=inputs)
        actual = [name for name, _ in model.named_parameters() if name.endswith("adapters.default.key")]
        return [name.removesuffix(".adapters.default.key") for name in actual]

    assert places() == ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn"]
    assert places("encoder_attn") == ["decoder.layers.0.encoder_attn"]
    assert places("re:decoder.*self_attn") == ["decoder.layers.0.self_attn"]


def test_half_precision_and_autocast() -> None:
    model = adapt(llama().to(torch.bfloat16))
    assert box(attentions_of(model)[0]).key.dtype is torch.float32
    expected = logits(copy.deepcopy(model).float(), input_ids=IDS)
    actual = logits(model, input_ids=IDS)
    assert actual.dtype is torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.3)  # bfloat16 has 8 bits
    model = adapt(llama())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            logits(model, input_ids=IDS).float(), logits(reference(model), input_ids=IDS).float(), rtol=0.1, atol=0.3
        )


def test_compile_and_export() -> None:
    model = adapt(llama())
    model.config.use_cache = False
    expected = logits(model, input_ids=IDS)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, input_ids=IDS), expected, **CLOSE)
    for strict in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # transformers' forwards set a context variable
            program = torch.export.export(model, (), {"input_ids": IDS}, strict=strict)
        torch.testing.assert_close(logits(program.module(), input_ids=IDS), expected, **CLOSE)
    torch._dynamo.reset()


def test_refusals() -> None:
    model = llama()
    before = Snapshot(model)
    with pytest.raises(PlanError, match="needs example_inputs"):
        apply_rules(model, [PrefixRule()])
    with pytest.raises(PlanError, match="no products of a softmax and values"):
        apply_rules(model, [PrefixRule("q_proj")], example_inputs={"input_ids": IDS})
    with pytest.raises(PlanError, match="nothing to do"):
        apply_rules(nn.Sequential(nn.Linear(4, 4)), [PrefixRule()], example_inputs=torch.ones(2, 4))
    wrong: list[dict[str, Any]] = [{"length": 0}, {"length": 2.0}, {"init": "text"}, {"gate": 1}]
    for bad in wrong:
        with pytest.raises(RuleError):
            PrefixRule(**bad)
    assert before.differences(model) == []
    adapt(model)
    attention: Any = attentions_of(model)[0]
    x = torch.randn(2, 6, 32)
    places = model.model.rotary_emb(x, torch.arange(6)[None])
    with pytest.raises(SiteError, match="can't widen"):
        attention(x, position_embeddings=places, attention_mask=object())


def test_it_is_data() -> None:
    rules = [PrefixRule("self_attn", length=7, gate=True)]
    assert rules_from_json(rules_to_json(rules)) == rules
