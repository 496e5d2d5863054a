"""`commit` makes adapters final: ordinary modules, weights and configuration, without a trace of the engine."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from surgery import (
    PlanError,
    SurgeryError,
    SurgeryWarning,
    activate,
    adapters,
    apply_rules,
    commit,
    deactivate,
    merge,
    remove,
    route,
    unmerge,
    using,
)
from surgery.rules import CaptureRule, DropRule, LoraRule, ReorderRule, RepeatRule, ReplaceRule, TrainRule
from surgery.testing import Snapshot

IDS = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = dict(vocab_size=50, hidden_size=32, num_attention_heads=4, intermediate_size=64)


def llama(layers: int = 4, **settings: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SIZES, **settings)).eval()


def net() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))
    model[0].bias.requires_grad_(False)
    return model


class Gate(nn.Module):
    """Another computation than a LlamaMLP's, with children, a buffer and a tied weight."""

    def __init__(self, size: int = 32):
        super().__init__()
        self.a, self.b = nn.Linear(size, size, bias=False), nn.Linear(size, size)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.full((size,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))) * self.scale


class Two(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x if mask is None else x * mask


class Calls(nn.Module):
    """A model that calls its inner module with an argument that a ReLU does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Two()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, mask=torch.ones_like(x))


def traces(model: nn.Module) -> list[str]:
    """What an engine leaves on modules: attributes, classes, hooks."""
    found = [f"{path}: {key}" for path, m in model.named_modules() for key in m.__dict__ if "surgery" in key]
    found += [f"{path}: {type(m)}" for path, m in model.named_modules() if hasattr(type(m), "_surgery_base")]
    for path, module in model.named_modules():
        for name, table in vars(module).items():
            if name.endswith("_hooks") and table:
                found += [f"{path}: {hook}" for hook in table.values() if "surgery" in type(hook).__module__]
    ignored = vars(model).get("_keys_to_ignore_on_save") or ()
    return (
        found + [key for key in ignored if "adapter" in key] + [key for key in vars(model) if key == "save_pretrained"]
    )


def loaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return type(model).from_pretrained(folder).eval()


STRUCTURES = [
    (DropRule("model.layers.1"), 3),
    (RepeatRule("model.layers", order=[0, 1, 2, 1, 2, 3]), 6),
    (RepeatRule("model.layers", times=2, shared=True), 8),
    (ReorderRule("model.layers", order=[3, 2, 1, 0]), 4),
]


@pytest.mark.parametrize(("rule", "layers"), STRUCTURES, ids=lambda value: getattr(value, "label", str(value)))
def test_a_structure_becomes_the_model_of_its_class(rule: Any, layers: int, tmp_path: Path) -> None:
    model = llama()
    wanted = apply_rules(model, rule)(IDS).logits
    assert commit(model) is model and not traces(model)
    assert torch.equal(model(IDS).logits, wanted)
    plain = LlamaForCausalLM(model.config)
    assert list(plain.state_dict()) == list(model.state_dict()) and model.config.num_hidden_layers == layers
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(layers))
    other = loaded(model, tmp_path)
    assert torch.equal(other(IDS).logits, wanted) and other.config.num_hidden_layers == layers
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=4), other.generate(IDS[:1], max_new_tokens=4))
    with pytest.raises(SurgeryError, match="no rules were applied"):
        remove(model)


def test_shared_copies_stay_shared_where_nothing_is_saved_by_class() -> None:
    small = nn.Sequential(OrderedDict(layers=nn.Sequential(nn.Linear(4, 4))))
    commit(apply_rules(small, RepeatRule("layers", times=2, shared=True)))
    assert small[0][0].weight is small[0][1].weight  # type: ignore[index]
    model = llama()
    commit(apply_rules(model, RepeatRule("model.layers", times=3, shared=True)))
    pointers = {p.data_ptr() for p in model.parameters()}
    assert len(pointers) == len(list(model.parameters(recurse=True))) == len(list(model.named_parameters()))
    assert len(model.model.layers) == 12


def test_lora_on_copies_that_share_weights(tmp_path: Path) -> None:
    model = apply_rules(llama(2), RepeatRule("model.layers", times=2, shared=True), adapter="deep")
    apply_rules(model, LoraRule("q_proj", rank=2, init="random"))
    wanted = model(IDS).logits
    commit(model)
    torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=1e-4)
    assert not traces(model) and all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(loaded(model, tmp_path)(IDS).logits, model(IDS).logits)


def test_lora_and_structure_together(tmp_path: Path) -> None:
    model = llama()
    flags = [p.requires_grad for p in model.parameters()]
    model.model.embed_tokens.weight.requires_grad_(False)
    apply_rules(model, [DropRule("model.layers.0"), LoraRule("all-linear", rank=2, init="random", dropout=0.5)])
    apply_rules(model, RepeatRule("model.layers", order=[0, 1, 1, 2]), adapter="deep")
    wanted = model(IDS).logits
    commit(model)
    assert not traces(model)
    torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=1e-4)
    assert [p.requires_grad for p in model.parameters()] == [False, *flags[1:]]
    assert torch.equal(loaded(model, tmp_path)(IDS).logits, model(IDS).logits)


def test_a_module_put_in_place_has_its_trained_tensors_under_its_own_names() -> None:
    model = llama(2)
    before = dict(model.named_parameters())
    apply_rules(model, [ReplaceRule("mlp", by=Gate(), trainable=True), LoraRule("q_proj", rank=2, init="random")])
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.1
    trained: Any = model.model.layers[1].mlp.adapters.default
    tensors = dict(trained.named_parameters())
    wanted = model(IDS).logits
    with pytest.warns(SurgeryWarning, match=r"does not build this model: model.layers.0.mlp is a Gate, in the place"):
        commit(model)
    assert not traces(model)
    torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=1e-4)
    gate: Any = model.model.layers[1].mlp
    assert type(gate) is Gate and gate.a.weight is gate.b.weight and gate.a.weight is tensors["a_weight"]
    assert not gate.training and {"a.weight", "b.bias", "scale"} < {*gate.state_dict()}
    now = dict(model.named_parameters())
    assert all(now[name] is before[name] and now[name].requires_grad for name in now if ".mlp." not in name)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)


def test_a_module_put_in_place_in_another_dtype() -> None:
    model = net().bfloat16()
    apply_rules(model, ReplaceRule("2", by=nn.Linear(8, 8), trainable=False))
    wanted = model(X.bfloat16())
    commit(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model[2].weight.requires_grad
    torch.testing.assert_close(model(X.bfloat16()), wanted, atol=2e-2, rtol=2e-2)  # its weight is rounded


def test_a_shared_module_is_replaced_under_each_name() -> None:
    act = nn.Tanh()
    model = nn.Sequential(nn.Linear(8, 8), act, nn.Sequential(nn.Linear(8, 8), act))
    wanted = apply_rules(model, ReplaceRule("1", by="torch.nn.GELU"))(X)
    commit(model)
    assert model[1] is model[2][1] and type(model[1]) is nn.GELU and torch.equal(model(X), wanted)  # type: ignore[index]


def refusal(model: nn.Module, *args: Any) -> str:
    before = Snapshot(model)
    with pytest.raises((PlanError, SurgeryError)) as error:
        commit(model, *args)
    assert before.differences(model) == []
    return str(error.value)


def test_refused_with_the_reason() -> None:
    model = apply_rules(net(), [CaptureRule("1"), LoraRule("0", rank=2)])
    text = refusal(model)
    assert "CaptureRule [default] can't be committed" in text and "where: 1" in text and "fix:" in text

    calls = apply_rules(Calls(), ReplaceRule("inner", by="torch.nn.ReLU"))
    text = refusal(calls)
    assert "a ReLU can't stand in the place of this Two" in text and "Two.forward takes x, mask" in text

    layers = apply_rules(llama(), ReplaceRule("model.layers.1", by="torch.nn.Identity"))
    assert "an Identity" in refusal(layers).replace("a Identity", "an Identity")

    itself = apply_rules(nn.Linear(4, 4), ReplaceRule(nn.Linear, by="torch.nn.Identity"))
    assert "the model itself" in refusal(itself)

    two = apply_rules(net(), ReplaceRule("1", by="torch.nn.GELU"), adapter="a")
    apply_rules(two, CaptureRule("1"), adapter="b")
    assert "CaptureRule [b]" in refusal(two) and "is on the same site" in refusal(two, "a")

    hooked = apply_rules(net(), ReplaceRule("1", by="torch.nn.GELU"))
    hooked[1].register_forward_hook(lambda *_: None)
    assert "hooks of other code" in refusal(hooked)

    tied = llama(1, tie_word_embeddings=True)
    apply_rules(tied, LoraRule("lm_head", rank=2, init="random"))
    assert "untie=True" in refusal(tied)
    merge(tied, untie=True)
    wanted = tied(IDS).logits
    commit(tied)
    assert torch.equal(tied(IDS).logits, wanted) and tied.config.tie_word_embeddings is False and not traces(tied)


def test_refused_where_adapters_are_in_use_or_idle() -> None:
    model = apply_rules(net(), LoraRule("0", rank=2, init="random"), adapter="a")
    apply_rules(model, LoraRule("2", rank=2, init="random"), adapter="b")
    with using(model, "a"):
        assert "using" in refusal(model)
    with route(model, ["a", "b", None]):
        assert "routed" in refusal(model)
    activate(model, "a")
    assert "the adapter 'b' is idle" in refusal(model)
    assert "no adapter 'c'" in refusal(model, "c")
    wanted = model(X)
    commit(model, "a")
    assert list(adapters(model)) == ["b"]
    torch.testing.assert_close(model(X), wanted)
    deactivate(model)
    activate(model, "b")
    remove(model)
    assert not traces(model) and torch.allclose(model(X), wanted, atol=1e-6)


def test_one_adapter_of_several() -> None:
    """The structure becomes final, and the adapter on it trains on: its base stays frozen until it is removed."""
    model = llama()
    apply_rules(model, DropRule("model.layers.1"), adapter="cut")
    apply_rules(model, LoraRule("q_proj", rank=2, init="random"), adapter="lora")
    wanted = model(IDS).logits
    commit(model, "cut")
    assert list(adapters(model)) == ["lora"] and torch.equal(model(IDS).logits, wanted)
    assert not model.lm_head.weight.requires_grad
    remove(model)
    assert model.lm_head.weight.requires_grad and len(model.model.layers) == 3 and not traces(model)


def test_a_structure_while_another_adapter_is_merged() -> None:
    model = llama()
    apply_rules(model, LoraRule("q_proj", rank=2, init="random"), adapter="lora")
    apply_rules(model, DropRule("model.layers.1"), adapter="cut")
    live = model(IDS).logits
    merge(model, "lora")
    wanted = model(IDS).logits
    commit(model, "cut")
    assert torch.equal(model(IDS).logits, wanted)
    assert torch.equal(unmerge(model)(IDS).logits, live)
    remove(model)
    assert len(model.model.layers) == 3 and not traces(model)


def test_what_stays_must_not_need_what_goes() -> None:
    model = llama()
    apply_rules(model, LoraRule("q_proj", rank=2, init="random"), adapter="lora")
    apply_rules(model, DropRule("model.layers.1"), adapter="cut")
    text = refusal(model, "lora")
    assert "on a layer that a structural rule took out" in text and "commit 'cut', too" in text
    apply_rules(model, DropRule("model.layers.0"), adapter="again")
    assert "changed the same modules before" in refusal(model, "again")
    wanted = model(IDS).logits
    commit(model, ["cut", "again"])
    assert torch.equal(model(IDS).logits, wanted) and adapters(model)["lora"].sites == tuple(
        f"model.layers.{index}.self_attn.q_proj" for index in range(2)
    )
    commit(model)
    torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=1e-4)
    inner = apply_rules(net(), ReplaceRule("1", by="torch.nn.GELU"), adapter="gelu")
    apply_rules(inner, ReorderRule(nn.Sequential, order=[0, 2, 1, 3]), adapter="order")
    assert "has to find the module there" in refusal(inner, "gelu")


def test_a_replaced_module_beside_an_adapter_that_stays() -> None:
    model = net()
    apply_rules(model, ReplaceRule("2", by=nn.Linear(8, 8)), adapter="new")
    apply_rules(model, LoraRule("0", rank=2, init="random"), adapter="lora")
    wanted = model(X)
    commit(model, "new")
    assert torch.equal(model(X), wanted) and not model[2].weight.requires_grad
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "0.adapters.lora.A",
        "0.adapters.lora.B",
    ]
    remove(model)
    assert [p.requires_grad for p in model.parameters()] == [True, False, *[True] * 4] and not traces(model)


def test_a_trained_head_and_a_weight_changed_at_the_start() -> None:
    model = net()
    apply_rules(model, [LoraRule("0", rank=2, init="pissa"), TrainRule("3")])
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn_like(parameter)
    wanted = model(X)
    commit(model)
    assert not traces(model) and type(model[3]) is nn.Linear
    torch.testing.assert_close(model(X), wanted, atol=1e-5, rtol=1e-4)


def test_a_model_without_a_plain_class_warns(tmp_path: Path) -> None:
    """A BertModel has no configuration for layers of different sizes; the model is still ordinary modules."""
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(num_hidden_layers=2, **SIZES)
    model = BertModel(BertConfig(**settings)).eval()
    apply_rules(model, ReplaceRule("encoder.layer.0.intermediate.intermediate_act_fn", by="torch.nn.ReLU"))
    wanted = model(IDS).last_hidden_state
    with pytest.warns(SurgeryWarning, match="from_pretrained of BertModel does not build this model"):
        commit(model)
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(other(IDS).last_hidden_state, wanted) and not traces(other)
