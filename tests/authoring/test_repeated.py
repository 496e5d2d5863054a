"""Rules that run a forward twice: right without a cache, an error if the forward writes to a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import PlanError, Rule, Site, SiteError, SurgeryError, apply_rules, merge, plan_rules, remove, rule
from surgery.rules import LoraRule, ReplaceRule
from surgery.testing import Snapshot

transformers: Any = pytest.importorskip("transformers")
IDS = torch.tensor([[5, 3, 9, 2, 7]])
SMALL: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()


@rule("run-twice")
class TwiceRule(Rule):
    why_not_merged = "it repeats a module"

    def rewrite(self, site: Site) -> Any:
        return site.call(site.hidden)


@rule("run-child-twice")
class AgainRule(Rule):
    """Runs a decoder layer's attention a second time, on its own output."""

    why_not_merged = "it repeats a module"

    def rewrite(self, site: Site) -> Any:
        nodes = {str(node.target): node for node in site.graph.nodes if node.op == "call_module"}
        attention = nodes["self_attn"]
        attention_output = next(user for user in attention.users if "getitem" in str(user.target))
        more: Any = site.again(site.at(attention), {nodes["input_layernorm"]: site.at(attention_output)})
        site.replace(site.at(attention_output), more[0])


@rule("update-twice")
class UpdateRule(Rule):
    """Makes an attention put its keys into the cache twice."""

    why_not_merged = "it repeats an update"

    def rewrite(self, site: Site) -> Any:
        update = next(node for node in site.graph.nodes if str(node.target) == "update")
        site.replace(site.at(update), site.apply(latter, site.base(site.at(update)), site.again(site.at(update), {})))


def latter(first: Any, second: Any) -> Any:
    return second


def twice(model: Any, path: str) -> Any:
    """A copy of the model whose module at this path runs twice, in plain torch."""
    other = copy.deepcopy(model)
    module = other.get_submodule(path)
    own = module.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        first = own(hidden_states, *args, **kwargs)
        return own(first[0] if isinstance(first, tuple) else first, *args, **kwargs)

    module.forward = forward
    return other


@pytest.mark.parametrize("example", [None, {"input_ids": IDS, "use_cache": False}])
@pytest.mark.parametrize("path", ["model.layers.0", "model.layers.1", "model.layers.1.self_attn"])
def test_a_layer_that_runs_twice(path: str, example: Any) -> None:
    model = llama()
    before, reference = Snapshot(model), twice(model, path)
    apply_rules(model, [TwiceRule(f"re:{path}")], example_inputs=example)
    live = Snapshot(model)
    with torch.no_grad():
        assert torch.equal(model(IDS, use_cache=False).logits, reference(IDS, use_cache=False).logits)
    expected = reference.generate(IDS, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(IDS, use_cache=False, **GREEDY), expected)
    for call in (lambda: model(IDS), lambda: model.generate(IDS, **GREEDY)):
        with pytest.raises(SiteError, match="2 times in one call, and it writes to a DynamicCache"):
            call()
    assert live.differences(model) == []
    remove(model)
    assert before.differences(model) == []


@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static", "filled", "inference"])
def test_the_cache_stays_as_it_was(kind: str) -> None:
    """Earlier layers have written to the cache before the error: their writes are undone, too."""
    model = llama()
    cache: Any = transformers.DynamicCache(config=model.config)
    if kind == "lazy":
        cache = transformers.DynamicCache()
    if kind == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=12)
    length = 0
    if kind == "filled":
        with torch.no_grad():
            model(IDS, past_key_values=cache)
        length = IDS.shape[1]
    cache_copy = copy.deepcopy(cache)
    apply_rules(model, [TwiceRule("re:model.layers.1")])
    with torch.inference_mode(kind == "inference"), pytest.raises(SiteError, match="writes to a"):
        model(IDS, past_key_values=cache, use_cache=True)
    remove(model)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [length] * len(cache.layers)
    with torch.no_grad():
        logits, expected = (model(IDS, past_key_values=past).logits for past in (cache, cache_copy))
    assert torch.equal(logits, expected)


def test_an_example_with_a_cache_is_refused_while_planning() -> None:
    model = llama()
    before, cache = Snapshot(model), transformers.DynamicCache(config=model.config)
    for example in ({"input_ids": IDS}, {"input_ids": IDS, "past_key_values": cache}):
        plan = plan_rules(model, [TwiceRule("re:model.layers.1")], example_inputs=example)
        assert "writes to a DynamicCache" in str(plan.problems[0]) and "model.layers.1" in str(plan.problems[0])
        with pytest.raises(PlanError, match="writes to a DynamicCache"):
            apply_rules(model, [TwiceRule("re:model.layers.1")], example_inputs=example)
        with pytest.raises(SurgeryError, match="writes to a DynamicCache|later calls would see"):
            apply_rules(model, [AgainRule("re:model.layers.1")], example_inputs=example)
    assert before.differences(model) == [] and cache.get_seq_length() == 0


@pytest.mark.parametrize("kind", [AgainRule, UpdateRule])
def test_what_runs_again_inside_of_a_forward(kind: Any) -> None:
    model = llama()
    path = "re:model.layers.1" + (".self_attn" if kind is UpdateRule else "")
    if kind is UpdateRule:
        with pytest.raises(SurgeryError, match="writes to a DynamicCache|later calls would see"):
            apply_rules(model, [kind(path)], example_inputs={"input_ids": IDS})
        return
    apply_rules(model, [kind(path)], example_inputs={"input_ids": IDS, "use_cache": False})
    expected = model.generate(IDS, use_cache=False, **GREEDY)
    assert not torch.equal(expected, remove(copy.deepcopy(model)).generate(IDS, use_cache=False, **GREEDY))
    cache = transformers.DynamicCache(config=model.config)
    with pytest.raises(SiteError, match="2 times in one call"):
        model(IDS, past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_a_state_space_layer() -> None:
    config = transformers.MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0)
    model: Any = transformers.MambaForCausalLM(config).eval()
    apply_rules(model, [TwiceRule("re:backbone.layers.1")])
    model.generate(IDS, use_cache=False, **GREEDY)
    with pytest.raises(SiteError, match="writes to a"):
        model.generate(IDS, **GREEDY)


class BufferCache(nn.Module):
    """A cache in the module's own buffer, written at the positions that a call passes."""

    keys: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("keys", torch.zeros(6, 4))

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        x = self.linear(x)
        if at is not None:
            self.keys[at] = x.detach()
            return x + self.keys.sum(0)
        return x


class Plain(nn.Module):
    """A cache that is a plain dictionary, and a list that only collects."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor, cache: dict[str, Tensor] | None = None) -> Tensor:
        x = self.norm(self.linear(x))
        if cache is not None:
            cache["keys"] = torch.cat([cache["keys"], x]) if "keys" in cache else x
            return x + cache["keys"].sum(0)
        return x


def test_caches_of_other_kinds() -> None:
    x = torch.randn(3, 4)
    model = nn.ModuleDict({"kept": BufferCache(), "plain": Plain()}).eval()
    apply_rules(model, [TwiceRule(["kept", "plain"])])
    with_buffer: Any = model["kept"]
    plain: Any = model["plain"]
    with torch.no_grad():
        torch.testing.assert_close(with_buffer(x), with_buffer.linear(with_buffer.linear(x)))
        with pytest.raises(SiteError, match="writes to a buffer of its own"):
            with_buffer(x, torch.arange(3))
        assert torch.equal(with_buffer.keys, torch.zeros(6, 4))
        cache: dict[str, Tensor] = {}
        with pytest.raises(SiteError, match="writes to a dict"):
            plain(x, cache)
        assert cache == {}
        filled_cache = {"keys": torch.ones(2, 4)}
        with pytest.raises(SiteError, match="writes to a dict"):
            plain(x, filled_cache)
        assert torch.equal(filled_cache["keys"], torch.ones(2, 4))


def test_statistics_are_counted_at_each_run() -> None:
    """The counts equal those of a batch norm that plain torch code calls twice."""
    x = torch.randn(8, 4)
    model: Any = nn.Sequential(Plain()).train()
    other = copy.deepcopy(model)
    apply_rules(model, [TwiceRule("0")])
    torch.testing.assert_close(model(x), other[0](other[0](x)))
    for name, buffer in other[0].norm.named_buffers():
        torch.testing.assert_close(getattr(model[0].norm, name), buffer)


def test_examples_and_merges_leave_a_given_cache_alone() -> None:
    model = llama()
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    cache_copy = copy.deepcopy(cache)
    example = {"input_ids": IDS[:, :2], "past_key_values": cache}
    apply_rules(model, [LoraRule("q_proj", rank=2)], example_inputs=example)
    merge(model)
    assert cache.get_seq_length() == 5
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, cache_copy.layers, strict=True))


def test_a_layer_that_is_left_out() -> None:
    """The first layer defines the length of a cache, so only later layers may be left out."""
    ids = torch.tensor([[0, 0, 5, 3, 9], [4, 5, 6, 7, 8]])
    for layer in (0, 1):
        model = apply_rules(llama(), [ReplaceRule(f"re:model.layers.{layer}", by="torch.nn.Identity")])
        expected = model.generate(ids, attention_mask=(ids > 0).long(), use_cache=False, **GREEDY)
        if layer:
            assert torch.equal(model.generate(ids, attention_mask=(ids > 0).long(), **GREEDY), expected)
        else:
            with pytest.raises(SiteError, match="leaves out the forward .* and the call has a cache"):
                model.generate(ids, attention_mask=(ids > 0).long(), **GREEDY)
