"""`synced` gives the merged tensors by name, as an inference engine loads them, and leaves the model alone."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import nn

from surgery import (
    MergeError,
    PlanError,
    SurgeryError,
    activate,
    apply_rules,
    base_state_dict,
    merge,
    remove,
    synced,
    unmerge,
)
from surgery.packed.packed_weight import packed_weight_of
from surgery.rules import BiasRule, IA3Rule, LoraRule, NormRule, OftRule, TokensRule
from surgery.testing import Snapshot
from tests.support.quantised import BY_NAME

TIMES = 1000 if os.environ.get("SURGERY_EXAMPLES") else 20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("steps", torch.arange(3))
        self.head = nn.Linear(16, 12, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(ids))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.down(torch.relu(self.up(x))))


def adapted(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    model = Net().to(dtype)
    rules = [
        LoraRule(["up", "down", "attention"], rank=3, init="random"), IA3Rule("down", feedforward=()), NormRule("norm"),
        TokensRule("embed", tokens=[3, 1]), BiasRule("up"),
    ]  # fmt: skip
    return apply_rules(model, rules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:.*swallowed more than:surgery.errors.SurgeryWarning")
def test_the_tensors_are_those_of_a_merge_to_the_bit(dtype: torch.dtype) -> None:
    model = adapted(dtype)
    before = Snapshot(model)
    with synced(model) as tensors:
        got = dict(tensors)
    assert not before.differences(model)
    merge(model)
    expected = base_state_dict(model)
    assert list(got) == list(expected) == list(Net().state_dict())
    assert all(torch.equal(got[name], expected[name]) and got[name].dtype == expected[name].dtype for name in got)
    with synced(model) as tensors:  # merged already: the tensors are the model's own
        assert all(tensor.data_ptr() == expected[name].data_ptr() for name, tensor in tensors)
    unmerge(model)
    assert not before.differences(model)


def test_many_steps_of_training_and_syncing_leave_the_base_to_the_bit() -> None:
    model, engine = adapted(), Net()
    base = copy.deepcopy(base_state_dict(model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    ids = torch.randint(0, 12, (2, 5))
    for _ in range(TIMES):
        loss = model(ids).square().mean()
        loss.backward()
        grads = [parameter.grad for parameter in trained]
        bits = [None if grad is None else grad.clone() for grad in grads]
        state = {id(p): copy.copy(values) for p, values in optimiser.state.items()}
        with synced(model) as tensors:
            engine.load_state_dict(dict(tensors))
        for parameter, grad, values in zip(trained, grads, bits, strict=True):
            assert parameter.grad is grad and (grad is None or values is None or torch.equal(grad, values))
        assert {id(p): copy.copy(values) for p, values in optimiser.state.items()} == state
        torch.testing.assert_close(engine(ids), model(ids), rtol=1e-4, atol=1e-5)
        optimiser.step()
        optimiser.zero_grad()
    assert all(torch.equal(tensor, base[name]) for name, tensor in base_state_dict(remove(model)).items())


def test_errors_and_the_end_of_the_block_change_nothing() -> None:
    model = adapted()
    before = Snapshot(model)
    with pytest.raises(ZeroDivisionError), synced(model) as tensors:
        next(tensors)
        raise ZeroDivisionError
    with pytest.raises(SurgeryError, match="block of synced has ended"):
        next(tensors)
    assert not before.differences(model)
    with synced(model) as tensors:
        ids = torch.randint(0, 12, (2, 5))
        model(ids).sum().backward()  # the model is live inside the block
        assert len(list(tensors)) == len(Net().state_dict())


def test_only_the_named_adapters_count() -> None:
    model = apply_rules(adapted(), LoraRule("head", rank=2, init="random"), adapter="other")
    activate(model, ["default", "other"])
    head = model.head.weight.detach().clone()
    with synced(model, "default") as tensors:
        assert torch.equal(dict(tensors)["head.weight"], head)
    with synced(model, ["default", "other"]) as tensors:
        assert not torch.equal(dict(tensors)["head.weight"], head)
    merge(model, "default")
    with pytest.raises(PlanError, match="merged already"), synced(model, "other"):
        pass


def test_a_shared_weight_is_refused_before_the_first_tensor_and_untied_if_asked() -> None:
    model = Net()
    model.head.weight = nn.Parameter(torch.randn(12, 16))
    model.embed.weight = model.head.weight
    apply_rules(model, LoraRule("head", rank=2, init="random"))
    with pytest.raises(MergeError, match="another module"), synced(model):
        pass
    with synced(model, untie=True) as tensors:
        got = dict(tensors)
    assert torch.equal(got["embed.weight"], model.embed.weight)
    assert not torch.equal(got["head.weight"], got["embed.weight"])


@pytest.mark.parametrize("name", ["bitsandbytes Linear8bitLt", "bitsandbytes Linear4bit nf4", "torchao int8"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_quantised_modules_give_dequantised_tensors(name: str) -> None:
    torch.manual_seed(0)
    try:
        layers: Any = [BY_NAME[name].build(nn.Linear(32, 32)) for _ in range(2)]
    except ImportError:
        pytest.skip("the backend is not installed")
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Linear(32, 4))
    apply_rules(model, [LoraRule("0", rank=2, init="random"), OftRule("3", block_size=4)])
    codes = [packed_weight_of(layer).tensors()["weight" if "torchao" not in name else "qdata"] for layer in layers]  # type: ignore[union-attr]
    kept = [tensor.clone() for tensor in codes]
    x = torch.randn(3, 32)
    live = model(x)
    with pytest.raises(PlanError, match="can't be merged"), synced(model):
        pass
    with synced(model, quantised="dequantise") as tensors:
        got = dict(tensors)
    engine = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Linear(32, 4))
    engine.load_state_dict(got)
    assert (engine(x) - live).norm() < (3e-2 if "8bit" in name else 1e-5) * live.norm()
    assert all(torch.equal(a, b) for a, b in zip(codes, kept, strict=True)) and torch.equal(model(x), live)
    merge(model, quantised="dequantise")
    assert all(torch.equal(got[f"{path}.weight"], model.get_submodule(path).weight) for path in "03")  # type: ignore[arg-type,union-attr]
    unmerge(model)
    with pytest.raises(MergeError, match="depend on the backend"), synced(model, quantised="requantise"):
        pass


@pytest.mark.parametrize("change", [merge, remove, lambda model: apply_rules(model, LoraRule("up"), adapter="more")])
def test_a_change_of_adapters_inside_the_block_is_an_error(change: Any) -> None:
    model = adapted()
    before = Snapshot(model)
    with synced(model) as tensors:
        next(tensors)
        change(model)
        with pytest.raises(SurgeryError, match="adapters changed inside the block"):
            next(tensors)
        if change is merge:
            unmerge(model)
            next(tensors)
            assert not before.differences(model)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("layer", ["plain", "quantised"])
def test_a_module_with_two_names_has_the_change_under_both(layer: str, rounding: Any) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(64, 64).to(torch.bfloat16)
    if layer == "quantised":
        shared = BY_NAME["bitsandbytes Linear4bit nf4"].build(nn.Linear(64, 64))
    block = nn.Sequential(shared, nn.Tanh())
    model = nn.Sequential(block, nn.Linear(64, 64), block, shared)
    apply_rules(model, LoraRule(["re:0[.]0", "re:1"], rank=4, init="random"))
    options: Any = {"quantised": "dequantise", "rounding": rounding, "dtype": torch.bfloat16}
    torch.manual_seed(1)
    with synced(model, **options) as tensors:
        got = dict(tensors)
    torch.manual_seed(1)
    merge(model, **options)
    expected = base_state_dict(model)
    assert list(got) == list(expected) and all(torch.equal(got[name], expected[name]) for name in expected)
