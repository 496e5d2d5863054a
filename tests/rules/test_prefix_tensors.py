"""Where a prefix's keys and values come from: an MLP that can be taken out, or the activations of a text."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    Rule,
    RuleError,
    SurgeryError,
    adapter_state_dict,
    apply_rules,
    folded_adapter,
    load_adapter_state_dict,
    remove,
    rule,
    rules_of,
)
from surgery.rules import BottleneckRule, LoraRule, PrefixRule, fit_prefix
from surgery.rules._attention.prefix import listeners, project
from surgery.testing import Snapshot

transformers: Any = pytest.importorskip("transformers")
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
TEXT, MORE = torch.tensor([[5, 3, 9, 2]]), torch.tensor([[7, 1, 8]])
EXAMPLE = {"input_ids": TEXT}


def llama(**more: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2(**more: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, **more
    )
    return transformers.GPT2LMHeadModel(config).eval()


MODELS: dict[str, Callable[..., Any]] = {"llama": llama, "gpt2": gpt2}


@torch.no_grad()
def logits(model: Any, ids: Tensor = TEXT, **more: Any) -> Tensor:
    return model(input_ids=ids, **more).logits


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".adapters." in name:
                tensor.add_(torch.randn_like(tensor) * 0.3)


def boxes(model: nn.Module, adapter: str = "default") -> list[Any]:
    params = [module._modules["adapters"] for module in model.modules() if "adapters" in module._modules]
    actual: list[Any] = [getattr(item, adapter) for item in params if hasattr(item, adapter)]
    return [box for box in actual if "key" in box._parameters or "embedding" in box._parameters]


# Made by an MLP -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_projection_is_an_mlp_and_folds_to_the_bit(name: str, gate: bool) -> None:
    model = MODELS[name]()
    before, base = Snapshot(model), logits(model)
    apply_rules(model, [PrefixRule(length=3, projection=6, gate=gate)], example_inputs=EXAMPLE)
    assert torch.equal(logits(model), base) is gate
    disturb(model)
    expected = logits(model)
    by_hand = []
    for box in boxes(model):
        hidden = torch.tanh(box.embedding @ box.inner.T + box.inner_bias)
        by_hand.append(torch.einsum("lw,khsw->khls", hidden, box.outer) + box.outer_bias.unsqueeze(2))
    rules, tensors = folded_adapter(model)
    assert rules == [PrefixRule(length=3, gate=gate)]
    assert len(tensors) == (6 if gate else 4)
    other_tensors = {path: tensor.clone() for path, tensor in tensors.items()}
    remove(model)
    apply_rules(model, rules, example_inputs=EXAMPLE)
    load_adapter_state_dict(model, other_tensors)
    assert torch.equal(logits(model), expected)
    for box, (key, value) in zip(boxes(model), by_hand, strict=True):
        torch.testing.assert_close(box.key, key, **CLOSE)
        torch.testing.assert_close(box.value, value, **CLOSE)
    remove(model)
    assert before.differences(model) == []


def test_every_tensor_of_the_mlp_is_trained() -> None:
    model = llama()
    apply_rules(model, [PrefixRule(length=3, projection=6)], example_inputs=EXAMPLE)
    logits_now = model.train()(input_ids=TEXT).logits
    logits_now.square().mean().backward()
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    assert len(trained) == 10 and all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in trained)


def test_the_mlp_starts_as_pefts_and_from_zero() -> None:
    torch.manual_seed(0)
    model = llama()
    apply_rules(model, [PrefixRule(length=100, projection=64)], example_inputs=EXAMPLE)
    box = boxes(model)[0]
    assert box.embedding.std().item() == pytest.approx(1.0, rel=0.05)  # nn.Embedding
    for tensor in (box.inner, box.inner_bias, box.outer, box.outer_bias):  # nn.Linear: ±1/√inputs
        assert 0.9 / 8 < tensor.abs().max().item() <= 1 / 8
    remove(model)
    apply_rules(model, [PrefixRule(length=3, projection=8, init="zero")], example_inputs=EXAMPLE)
    assert all(not tensor.any() for tensor in folded_adapter(model)[1].values())


def test_it_is_pefts_prefix_encoder() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder_of = pytest.importorskip("peft.tuners.prefix_tuning.model", exc_type=ImportError).PrefixEncoder
        from peft import PrefixTuningConfig

    heads, size, length = 4, 8, 5
    width = heads * size
    theirs = encoder_of(
        PrefixTuningConfig(
            num_virtual_tokens=length, token_dim=width, num_layers=1, num_attention_heads=heads,
            encoder_hidden_size=width, prefix_projection=True,
        )
    )  # fmt: skip
    first, _, last = theirs.transform
    past = theirs(torch.arange(length).unsqueeze(0)).view(1, length, 2, heads, size).permute(2, 0, 3, 1, 4)
    outer = last.weight.view(2, heads, size, width), last.bias.view(2, heads, size)
    actual = project(theirs.embedding.weight, first.weight, first.bias, *outer)
    torch.testing.assert_close(actual, past[:, 0], rtol=1e-6, atol=1e-6)


def test_folding_touches_nothing_and_leaves_other_rules_be() -> None:
    model = llama()
    rules = [
        LoraRule("q_proj", rank=2, init="random"),
        PrefixRule(length=3, projection=4),
        BottleneckRule("self_attn", size=2),
    ]
    apply_rules(model, rules, example_inputs=EXAMPLE)
    disturb(model)
    before = Snapshot(model)
    actual, tensors = folded_adapter(model)
    assert before.differences(model) == []
    assert actual == [rules[0], PrefixRule(length=3), rules[2]] and rules_of(model) == rules
    own = adapter_state_dict(model)
    other_names = [name for name in tensors if not name.endswith(("adapters.key", "adapters.value"))]
    assert len(other_names) == 2 * (2 + 4) and all(torch.equal(tensors[name], own[name]) for name in other_names)
    with pytest.raises(SurgeryError, match="no adapter"):
        folded_adapter(model, "other")


def test_a_rule_that_folds_in_two_ways_is_told() -> None:
    @rule("test-two-ways")
    class TwoWays(Rule):
        size: int = 1

        def rewrite(self, site: Any) -> Any:
            return site.output + site.param("shift", (site.out_features,))

        def folded(self, site: Any) -> Any:
            return self.replace(size=int(site.path) + 2), site.params

    model = apply_rules(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), [TwoWays(["0", "1"])])
    with pytest.raises(RuleError, match="different rules at different sites"):
        folded_adapter(model)


# Fitted to a text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_of_a_text_goes_on_as_after_the_text(name: str, kind: str) -> None:
    model = MODELS[name](attn_implementation=kind)
    whole = logits(model, torch.cat([TEXT, MORE], 1))
    apply_rules(model, [PrefixRule(length=4)], example_inputs=EXAMPLE)
    disturb(model)
    fit_prefix(model, EXAMPLE)
    at = torch.arange(4, 7).unsqueeze(0)
    torch.testing.assert_close(logits(model, MORE, position_ids=at), whole[:, 4:], **CLOSE)
    tensors = adapter_state_dict(model)
    fit_prefix(model, EXAMPLE)  # what the prefix is at present plays no part
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapter_state_dict(model).items())
    assert listeners == {}
    remove(model)
    assert torch.equal(logits(model, torch.cat([TEXT, MORE], 1)), whole)


def test_only_the_first_positions_are_taken() -> None:
    model = llama()
    apply_rules(model, [PrefixRule(length=2)], example_inputs=EXAMPLE)
    fit_prefix(model, EXAMPLE)
    short = [box.key.detach().clone() for box in boxes(model)]
    fit_prefix(model, {"input_ids": TEXT[:, :2]})
    for box, key in zip(boxes(model), short, strict=True):
        torch.testing.assert_close(box.key, key, **CLOSE)


def test_other_adapters_are_live_meanwhile() -> None:
    model = llama()
    apply_rules(
        model,
        [PrefixRule(length=2), LoraRule("v_proj", rank=2, init="random")],
        adapter="other",
        example_inputs=EXAMPLE,
    )
    disturb(model)
    whole = logits(model, torch.cat([TEXT, MORE], 1))
    apply_rules(model, [PrefixRule(length=4)], adapter="text", example_inputs=EXAMPLE)
    fit_prefix(model, EXAMPLE, adapter="text")
    after = logits(model, MORE, position_ids=torch.arange(4, 7).unsqueeze(0))
    torch.testing.assert_close(after, whole[:, 4:], **CLOSE)


def test_what_can_not_be_fitted_is_refused() -> None:
    model = llama().train()
    with pytest.raises(SurgeryError, match="no rules were applied"):
        fit_prefix(model, EXAMPLE)
    apply_rules(model, [LoraRule("q_proj", rank=2)], adapter="lora")
    apply_rules(model, [PrefixRule(length=4, projection=4)], adapter="made", example_inputs=EXAMPLE)
    apply_rules(model, [PrefixRule(length=4)], example_inputs=EXAMPLE)
    before = Snapshot(model)
    wrong: list[tuple[str, Any, str]] = [
        ("lora", EXAMPLE, "no PrefixRule"),
        ("made", EXAMPLE, "with a projection"),
        ("default", {"input_ids": TEXT[:, :3]}, "too short"),
        ("default", "a text", "the text 'a text'"),
        ("default", ["a text"], "the text 'a text'"),
        ("default", {"input_ids": "a text"}, "the text 'a text'"),
        ("default", {"input_ids": TEXT.repeat(2, 1)}, "2 texts"),
        ("default", {"input_ids": TEXT, "attention_mask": torch.tensor([[0, 1, 1, 1]])}, "padded"),
    ]
    for adapter, inputs, why in wrong:
        with pytest.raises(RuleError, match=why):
            fit_prefix(model, inputs, adapter)
    with pytest.raises(Exception, match="index"):
        fit_prefix(model, {"input_ids": TEXT + 100})
    assert before.differences(model) == [] and listeners == {} and model.training


def test_fields_of_a_projection() -> None:
    wrong: list[Any] = [0, 1.5, "512", True]
    for bad in wrong:
        with pytest.raises(RuleError, match="projection"):
            PrefixRule(projection=bad)


# One query, as when decoding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", ["none", "bool", "additive", "by head", "bias"])
@pytest.mark.parametrize("shared", [1, 2])
def test_one_query_is_answered_without_a_copy_of_the_keys(
    shared: int, masked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

    from surgery.rules._attention import prefix
    from surgery.rules._attention.prefix import with_prefix

    module: Any = nn.Module()
    module.num_key_value_groups, module.is_causal = shared, True
    heads, length, keys, size = 2, 3, 9, 4
    before = torch.randn(2, heads, length, size)
    query = torch.randn(2, heads * shared, 1, size)
    key, value = torch.randn(2, 2, heads, keys, size)
    mask, more = None, dict[str, Any](dropout=0.0, scaling=0.3)
    if masked == "bool":
        mask = torch.rand(2, 1, 1, keys) > 0.5
        mask[0] = False
    elif masked == "additive":
        mask = torch.randn(2, 1, 1, keys)
    elif masked == "by head":
        mask = torch.randn(2, heads * shared, 1, keys)
    elif masked == "bias":
        more["position_bias"], mask = torch.randn(1, heads * shared, 1, keys), torch.rand(2, 1, 1, keys) > 0.5
    attend = with_prefix(*before)
    expected = attend(sdpa, module, query, key, value, mask, **more)[0]
    monkeypatch.setattr(prefix, "_WORTHWHILE", 0)
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", None)  # the other way is not taken
    actual = attend(sdpa, module, query, key, value, mask, **more)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert actual.is_contiguous() and actual.shape == expected.shape


def test_generating_is_the_same_by_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.rules._attention import prefix

    model = llama()
    apply_rules(model, [PrefixRule(length=3)], example_inputs=EXAMPLE)
    disturb(model)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    ids = TEXT.repeat(2, 1)
    expected = model.generate(ids, **settings)
    monkeypatch.setattr(prefix, "_WORTHWHILE", 0)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), expected)
