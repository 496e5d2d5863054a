"""Modules replaced after rules were applied: verbs raise errors or move the site to the new module."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import surgery
from surgery import SurgeryError, apply_rules, merge, remove, save_adapter, summary, unmerge
from surgery.rules import (
    BiasRule,
    BottleneckRule,
    IA3Rule,
    LohaRule,
    LoraRule,
    NormRule,
    TokensRule,
    TrainRule,
    VeraRule,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def net() -> Net:
    return apply_rules(Net(), [LoraRule(["0", "2"], rank=2, init="random"), TrainRule("head")])


def fresh(model: Net) -> None:
    model.head = nn.Linear(8, 5)


def gone(model: Net) -> None:
    del model.body[2]


def container(model: Net) -> None:
    model.body = nn.Sequential(nn.Linear(8, 8))


def _using(model: nn.Module, *names: Any) -> None:
    with surgery.using(model, *names):
        pass


def _route(model: nn.Module) -> None:
    with surgery.route(model, ["default"]):
        pass


def folder() -> str:
    return tempfile.mkdtemp()


VERBS: dict[str, Callable[[Any], Any]] = {
    "apply": lambda m: apply_rules(m, LoraRule("0", rank=2), adapter="more"),
    "load": lambda m: surgery.load_adapter(m, save_adapter(net(), folder()), "more"),
    "remove": remove,
    "merge": merge,
    "unmerge": unmerge,
    "merge_to": lambda m: surgery.merge_to(m, folder()),
    "forget": surgery.forget,
    "save": lambda m: save_adapter(m, folder()),
    "combine": lambda m: surgery.combine(m, {"default": 1.0}, into="more"),
    "copy": lambda m: surgery.copy_adapter(m, "default", "more"),
    "rename": lambda m: surgery.rename_adapter(m, "default", "more"),
    "activate": surgery.activate,
    "deactivate": surgery.deactivate,
    "active": surgery.active,
    "using": lambda m: _using(m, None),
    "route": _route,
    "hotswap": lambda m: surgery.hotswap(m, "default", surgery.adapter_state_dict(net())),
    "pad_rank": lambda m: surgery.pad_rank(m, "default", 4),
    "show": lambda m: surgery.show(m, "body.0"),
    "draw": lambda m: surgery.draw(m, "body.0"),
    "summary": summary,
    "adapters": surgery.adapters,
    "adapter_state_dict": surgery.adapter_state_dict,
    "base_state_dict": surgery.base_state_dict,
    "load_state_dict": lambda m: surgery.load_adapter_state_dict(m, surgery.adapter_state_dict(net())),
    "folded": surgery.folded_adapter,
    "rules_of": surgery.rules_of,
    "push": lambda m: surgery.push_adapter(m, "me/none"),
    "export": lambda m: surgery.export_onnx(m, f"{folder()}/a.onnx", torch.ones(2, 8)),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("change", [fresh, gone, container])
def test_every_verb_tells(verb: str, change: Callable[[Net], None]) -> None:
    model = net()
    change(model)
    keys = list(model.state_dict())
    with pytest.raises(SurgeryError) as caught:
        VERBS[verb](model)
    message = str(caught.value)
    where = {"fresh": "head", "gone": "body.2", "container": "body.0"}[change.__name__]
    now = {"fresh": "another Linear(", "gone": "body has no 2 now", "container": "another Linear("}[change.__name__]
    rule = "TrainRule [default]" if change is fresh else "LoraRule [default]"
    assert all(part in message for part in (where, now, rule, "remove(model, check=False)")), message
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("change", [fresh, gone, container])
def test_the_way_out_leaves_a_plain_model(change: Callable[[Net], None], merged: bool) -> None:
    model, plain = net(), Net()
    if merged:
        merge(model)
    change(model)
    change(plain)
    if change is fresh:
        plain.head.load_state_dict(model.head.state_dict())
    elif change is container:
        plain.body.load_state_dict(model.body.state_dict())
    if merged:
        unmerge(model, check=False)
    remove(model, check=False)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(tensor, plain.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.__dict__.keys() == plain.__dict__.keys()
    apply_rules(model, LoraRule("head", rank=2))
    assert surgery.active(model) == ("default",)


def test_putting_the_module_back_is_enough() -> None:
    model, x = net(), torch.randn(2, 8)
    before, head = model(x), model.head
    fresh(model)
    with pytest.raises(SurgeryError):
        summary(model)
    model.head = head
    assert torch.equal(model(x), before)
    remove(model)
    assert torch.equal(model(x), Net()(x))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_tell_too(again: Callable[[Net], Net]) -> None:
    model = net()
    assert summary(again(model)).rows == summary(model).rows
    fresh(model)
    with pytest.raises(SurgeryError, match="no longer in the model"):
        merge(again(model))


def test_what_no_rule_is_on_may_be_replaced() -> None:
    model = apply_rules(Net(), LoraRule("0", rank=2))
    model.head = nn.Linear(8, 5)
    assert summary(model).rows[0][2] == 1
    assert remove(model)(torch.ones(1, 8)).shape == (1, 5)


def test_an_adapter_that_was_removed_is_not_missed() -> None:
    model = apply_rules(apply_rules(Net(), LoraRule("0", rank=2)), TrainRule("head"), adapter="head")
    summary(model)
    remove(model, "head")
    model.head = nn.Linear(8, 5)
    assert surgery.active(model) == ("default",)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_site_that_was_wrapped_is_still_there() -> None:
    model, x = net(), torch.randn(2, 8)
    before = model(x)
    model.body[0] = Wrapper(model.body[0])  # type: ignore[assignment]
    assert torch.equal(model(x), before) and summary(model).rows[0][2] == 2
    remove(model)
    assert torch.equal(model(x), Net()(x))


def test_sites_that_moved_are_saved_where_rules_still_lead_there() -> None:
    model = apply_rules(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), LoraRule(nn.Linear, rank=2))
    del model[0]
    loaded = remove(copy.deepcopy(model))
    assert surgery.load_adapter(loaded, save_adapter(model, folder(), format="surgery"))
    model = apply_rules(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), LoraRule("1", rank=2))
    del model[0]
    with pytest.raises(SurgeryError, match="modules of the model have moved"):
        save_adapter(model, folder())
    assert type(remove(model)[0]) is nn.Linear


# Sites that move: batch norms ----------------------------------------------------------------------------------


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("rule", [NormRule, BiasRule, TrainRule])
@pytest.mark.parametrize("merged", [False, True])
def test_batch_norms_are_followed(rule: Any, merged: bool) -> None:
    model, x = Convolved().eval(), torch.randn(2, 3, 8, 8)
    base = model(x)
    apply_rules(model, [rule("norm"), LoraRule("conv", rank=2, init="random")])
    box = model.norm.adapters.default  # type: ignore[union-attr]
    with torch.no_grad():
        for tensor in box.parameters():  # type: ignore[union-attr]
            tensor.add_(torch.randn_like(tensor))
    if merged:
        merge(model)
    before, trained = model(x), {key: tensor.clone() for key, tensor in surgery.adapter_state_dict(model).items()}
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert torch.equal(model(x), before)  # also before any verb runs
    if merged:
        unmerge(model)
    assert all(torch.equal(trained[key], tensor) for key, tensor in surgery.adapter_state_dict(model).items())
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    remove(model)
    assert torch.equal(model(x), base) and type(model.norm) is nn.SyncBatchNorm
    assert not model._forward_pre_hooks and list(model.norm._modules) == []


# Sites that move: vocabularies ---------------------------------------------------------------------------------

IDS = torch.tensor([[1, 2, 3, 31]])


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, num_hidden_layers=1, tie_word_embeddings=tied, **sizes)  # type: ignore[arg-type]
    ).eval()


def trained(model: nn.Module) -> None:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)


GROWING: dict[str, Any] = {
    "lora": LoraRule(["lm_head", "embed_tokens", "q_proj"], rank=2, init="random"),
    "dora": LoraRule("lm_head", rank=2, dora=True),
    "loha": LohaRule("lm_head", rank=2),
    "ia3": IA3Rule("lm_head"),
    "train": TrainRule("lm_head"),
    "train embedding": TrainRule("embed_tokens"),
    "tokens": TokensRule("embed_tokens", tokens=[1, 31]),
}


@pytest.mark.parametrize("size", [41, 24])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", GROWING)
def test_a_resized_vocabulary_is_followed(name: str, tied: bool, size: int) -> None:
    if size == 24 and name == "tokens":
        pytest.skip("the rows that it trains are gone: the next test")
    model = apply_rules(llama(tied), GROWING[name])
    trained(model)
    ids, flags = IDS.clamp(max=size - 1), {key: p.requires_grad for key, p in model.named_parameters()}
    before = model(ids).logits
    plain = llama(tied)
    torch.manual_seed(3)
    plain.resize_token_embeddings(size, mean_resizing=False)
    torch.manual_seed(3)
    model.resize_token_embeddings(size, mean_resizing=False)
    few = min(size, 32)
    assert torch.allclose(model(ids).logits[..., :few], before[..., :few], atol=1e-5)  # sums of other lengths
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    assert model.lm_head.out_features == size and model(torch.tensor([[size - 1]])).logits.shape[-1] == size
    if name == "lora":  # new tokens are untrained, so they have the base's output
        head: Any = model.lm_head
        hidden, box = torch.randn(1, 16), head.adapters.default
        wanted = F.linear(hidden, head.weight) + 4 * F.linear(F.linear(hidden, box.A), box.B)
        assert torch.allclose(head(hidden), wanted, atol=1e-5)
    check_merge(model, tied)
    place = save_adapter(model, folder())
    again = llama(tied)
    torch.manual_seed(3)
    again.resize_token_embeddings(size, mean_resizing=False)
    surgery.load_adapter(again, place)
    assert torch.equal(again(ids).logits, model(ids).logits)
    remove(model)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert type(model.lm_head) is nn.Linear and "resize_token_embeddings" not in model.__dict__


def check_merge(model: Any, tied: bool) -> None:
    live = model(torch.tensor([[0, 1]])).logits
    merge(model, untie=tied)
    assert torch.allclose(model(torch.tensor([[0, 1]])).logits, live, atol=1e-4)  # one more rounding to float32
    unmerge(model)
    assert torch.equal(model(torch.tensor([[0, 1]])).logits, live)


def test_idle_adapters_grow_along_and_optimizers_go_on() -> None:
    model = apply_rules(llama(), LoraRule("lm_head", rank=2, init="random"), adapter="a")
    apply_rules(model, LoraRule("lm_head", rank=3, init="random"), adapter="b")
    surgery.activate(model, "a")
    adapter: Any = model.lm_head.adapters.a  # type: ignore[union-attr]
    with surgery.using(model, "b"):
        before = model(IDS).logits
    tensor = adapter.B
    model.resize_token_embeddings(40, mean_resizing=False)
    assert model.lm_head.adapters.a.B is tensor and tensor.requires_grad  # type: ignore[union-attr]
    with surgery.using(model, "b"):
        assert torch.allclose(model(IDS).logits[..., :32], before, atol=1e-5)


@pytest.mark.parametrize(
    "rule, size, why",
    [
        (VeraRule("lm_head", rank=4), 40, "drawn again"),
        (BottleneckRule("lm_head"), 40, "something else for the old tokens"),
        (LoraRule("lm_head", rank=2, init="pissa"), 40, "changed the weight at its start"),
        (TokensRule("embed_tokens", tokens=[1, 31]), 24, "24 rows, none of number 31"),
    ],
)
def test_what_cannot_follow_refuses_before_anything_is_resized(rule: Any, size: int, why: str) -> None:
    model = apply_rules(llama(), rule)
    trained(model)
    before = model(IDS).logits
    with pytest.raises(SurgeryError, match=why):
        model.resize_token_embeddings(size)
    assert torch.equal(model(IDS).logits, before)
    remove(model)
    model.resize_token_embeddings(size)


def test_a_merged_model_is_not_resized_under_its_record() -> None:
    model = apply_rules(llama(), LoraRule("lm_head", rank=2, init="random"))
    merge(model)
    with pytest.raises(SurgeryError, match="merged"):
        model.resize_token_embeddings(40)
    unmerge(model)
    model.resize_token_embeddings(40)


def test_resizing_without_rules_on_the_vocabulary_is_transformers_own() -> None:
    model = apply_rules(llama(), LoraRule("q_proj", rank=2, init="random"))
    before = model(IDS).logits
    model.resize_token_embeddings(40, mean_resizing=False)
    assert torch.allclose(model(IDS).logits[..., :32], before, atol=1e-5)
    assert not model.lm_head.weight.requires_grad


def test_a_copy_resizes_itself() -> None:
    model = apply_rules(llama(), LoraRule("lm_head", rank=2, init="random"))
    other = copy.deepcopy(model)
    other.resize_token_embeddings(40)
    assert model.lm_head.out_features == 32 and summary(other).rows[0][2] == 1
    assert tuple(other.lm_head.adapters.default.B.shape) == (40, 2)  # type: ignore[union-attr]


def test_a_head_inside_of_an_encoder_model() -> None:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1)
    model = BertForMaskedLM(BertConfig(vocab_size=32, **sizes)).eval()  # type: ignore[arg-type]
    apply_rules(model, LoraRule("word_embeddings", rank=2, init="random"))
    before = model(IDS).logits
    model.resize_token_embeddings(40, mean_resizing=False)
    assert torch.allclose(model(IDS).logits[..., :32], before, atol=1e-5)
