"""Weights of live adapters multiply each rule's change, live and merged alike, and leave no trace."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery import SurgeryError, activate, adapters, apply_rules, deactivate, merge, remove, show, unmerge, using
from surgery.rules import (
    BottleneckRule,
    IA3Rule,
    LohaRule,
    LoraRule,
    NormRule,
    OftRule,
    PrefixRule,
    PromptRule,
    SteerRule,
    TokensRule,
    TrainRule,
    VeraRule,
)
from surgery.testing import Snapshot
from tests.support.tiny import llama

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
X = torch.randn(5, 8)


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval()


def disturb(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def test_lora_is_scaled_in_its_fast_form() -> None:
    model = two_layers()
    for name, rank in (("a", 2), ("b", 3)):
        apply_rules(model, LoraRule(["0", "2"], rank=rank, alpha=4, init="random"), adapter=name)
    activate(model, ["a", "b"], weights=[0.7, -0.4])
    x = X
    for layer in model:  # type: ignore[union-attr]
        if isinstance(layer, nn.Linear):
            boxes: Any = layer.adapters
            delta = 0.7 * 2 * boxes.a.B @ boxes.a.A - 0.4 * 4 / 3 * boxes.b.B @ boxes.b.A
            x = F.linear(x, layer.weight + delta, layer.bias)
        else:
            x = layer(x)
    torch.testing.assert_close(model(X), x, **CLOSE)
    assert "low_rank_linear" in show(model, "0", generated=True) and "weighted" not in show(model, "0")
    assert {name: adapter.weight for name, adapter in adapters(model).items()} == {"a": 0.7, "b": -0.4}


RULES: dict[str, Any] = {
    "lora": LoraRule("0", rank=2, init="random"),
    "dora": LoraRule("0", rank=2, init="random", dora=True),
    "lora with biases": LoraRule("0", rank=2, init="random", lora_bias=True, bias="lora_only"),
    "ia3": IA3Rule("0"),
    "ia3 on inputs": IA3Rule("0", feedforward="0"),
    "loha": LohaRule("0", rank=2),
    "vera": VeraRule("0", rank=2),
    "train": TrainRule("0"),
}


@pytest.mark.parametrize("name", RULES)
def test_a_linear_map_is_moved_by_as_much(name: str) -> None:
    """W_w = W + w (W_1 - W), and the same for the bias, for any linear rule on a Linear."""
    model = nn.Sequential(nn.Linear(8, 6))
    apply_rules(model, RULES[name])
    disturb(model)

    def map_of() -> Tensor:
        with torch.no_grad():
            bias = model(torch.zeros(1, 8))
            return torch.cat([model(torch.eye(8)) - bias, bias])

    whole = map_of()
    with using(model, None):
        plain = map_of()
    for weight in (0.5, -1.0, 2.0, 0.0):
        activate(model, "default", weight)
        torch.testing.assert_close(map_of(), plain + weight * (whole - plain), **CLOSE)
        live = map_of()
        merge(model)
        torch.testing.assert_close(map_of(), live, **CLOSE)
        unmerge(model)
        assert torch.equal(map_of(), live)
    activate(model, "default")
    assert torch.equal(map_of(), whole)


def test_other_places() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.conv = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Conv1d(8, 8, 3)
            self.block = nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.block(self.conv(self.norm(self.embed(ids)).mT).mT)

    ids = torch.randint(0, 9, (2, 7))
    for rules in (
        TokensRule("embed", tokens=[1, 2]),
        NormRule("norm"),
        OftRule("block", block_size=4),
        LoraRule(["embed", "conv", "block"], rank=2, init="random"),
        SteerRule("block"),
    ):
        model = Model().eval()
        before, plain = Snapshot(model), model(ids)
        disturb(apply_rules(model, rules))
        whole = model(ids)
        activate(model, "default", weights=0.0)
        torch.testing.assert_close(model(ids), plain, **CLOSE)
        activate(model, "default", weights={"default": 1 - 1e-7})
        torch.testing.assert_close(model(ids), whole, **CLOSE)
        activate(model, "default", 0.5)
        live = model(ids)
        assert not torch.allclose(live, plain, atol=1e-4) or type(rules) is TokensRule
        if rules.mergeable:
            merge(model)
            torch.testing.assert_close(model(ids), live, **CLOSE)
            unmerge(model)
        assert not before.differences(remove(model))


def test_what_is_not_linear_is_moved_by_as_much_of_its_output() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    base = model(X)
    disturb(apply_rules(model, BottleneckRule("0", size=4)))
    whole = model(X)
    activate(model, "default", 0.25)
    torch.testing.assert_close(model(X), base + 0.25 * (whole - base), **CLOSE)


def test_weights_follow_copies_and_leave_with_the_adapter() -> None:
    model = two_layers()
    before = Snapshot(model)
    apply_rules(model, LoraRule("0", rank=2, init="random"), adapter="a")
    activate(model, "a", 0.3)
    live = model(X)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(X), live) and adapters(other)["a"].weight == 0.3
        with using(other, "a", 2.0):
            assert not torch.allclose(other(X), live)
        assert torch.equal(other(X), live)
        assert torch.equal(activate(deactivate(other), "a", 0.3)(X), live)
    apply_rules(model, LoraRule("2", rank=2), adapter="b")  # a new LoRA changes nothing
    torch.testing.assert_close(model(X), live, **CLOSE)
    assert adapters(model)["a"].weight == 0.3
    assert not before.differences(remove(model))
    apply_rules(model, LoraRule("0", rank=2), adapter="a")
    assert adapters(model)["a"].weight == 1.0


def test_gradients_and_half_precision() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    apply_rules(model, LoraRule("0", rank=2, init="random"), adapter="a")
    activate(model, "a", 0.5)
    model(X).sum().backward()
    A: Any = model.get_parameter("0.adapters.a.A")
    B = model.get_parameter("0.adapters.a.B")
    expected = torch.autograd.grad((0.5 * 4 * X @ A.t() @ B.t()).sum(), A)[0]
    torch.testing.assert_close(A.grad, expected, **CLOSE)
    for dtype in (torch.float16, torch.bfloat16):
        half = nn.Sequential(nn.Linear(8, 8)).to(dtype)
        disturb(apply_rules(half, [IA3Rule("0")], adapter="b"))
        activate(half, "b", 0.5)
        assert half(X.to(dtype)).dtype == dtype
        merge(half)
        assert half(X.to(dtype)).dtype == dtype


def test_what_has_no_weight_says_so() -> None:
    model, _ = llama()
    ids = torch.tensor([[1, 2, 3]])
    apply_rules(model, PrefixRule(length=3), adapter="prefix", example_inputs={"input_ids": ids})
    apply_rules(model, PromptRule(length=3), adapter="prompt")
    with torch.no_grad():
        out = model(ids).logits
        for name in ("prefix", "prompt"):
            with pytest.raises(SurgeryError, match="can't have the weight 0.5") as caught:
                activate(model, ["prefix", "prompt"], {name: 0.5})
            assert "Rule can't be multiplied by a number" in str(caught.value)
        assert torch.equal(model(ids).logits, out)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for 2 adapters"),
        (math.nan, "not a finite number"),
        ([1.0, math.inf], "not a finite number"),
        ([1.0, "2"], "not a finite number"),
        ([True, 1.0], "not a finite number"),
        ({"c": 1.0}, "no adapter 'c'"),
    ],
)
def test_bad_weights(weights: Any, message: str) -> None:
    model = two_layers()
    for name in ("a", "b"):
        apply_rules(model, LoraRule("0", rank=2), adapter=name)
    with pytest.raises(SurgeryError, match=message):
        activate(model, ["a", "b"], weights)
    with pytest.raises(SurgeryError, match="not among the adapters"):
        activate(model, "a", {"b": 0.5})
    with pytest.raises(SurgeryError, match="named twice"):
        activate(model, ["a", "a"])
    assert all(adapter.live and adapter.weight == 1.0 for adapter in adapters(model).values())
