"""A rule at a module replaces a parameter of a child: the child computes with the new parameter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import Rule, Structure, apply_rules, remove, rule
from surgery.rules import LoraRule
from surgery.testing import Snapshot, assert_reversible

UP = Structure(lambda x, weight, bias: F.gelu(F.linear(x, weight, bias)))


@rule("test-child-scaled")
class ScaledRule(Rule):
    """Multiplies a weight inside the forward by a trained factor."""

    factor: float = 2.0
    looks: bool = True

    def rewrite(self, site: Any) -> None:
        factor = site.param("factor", (1,), self.factor)
        weight = site.find(UP)[0].bindings["weight"] if self.looks else site.tensor("up.weight")
        site.replace(weight, weight * factor)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.down(self.norm(F.gelu(self.up(x)))) * scale


class Straight(Mlp):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.down(self.norm(F.gelu(self.up(x))))


class Outer(nn.Module):
    """A module whose weights belong to a grandchild."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return F.gelu(self.inner(x)) + shift


@rule("test-grandchild-scaled")
class GrandchildRule(Rule):
    def rewrite(self, site: Any) -> None:
        for match in site.find(Structure(lambda x: F.gelu(x))):
            site.replace(match.root, match.root * 1.0)
        site.replace(site.tensor("inner.up.weight"), site.tensor("inner.up.weight") * 2)


def plainly(module: Any, x: Tensor, factor: Any) -> Tensor:
    return module.down(module.norm(F.gelu(F.linear(x, module.up.weight * factor, module.up.bias))))


X = torch.randn(6, 4)


@pytest.mark.parametrize("kind", [Mlp, Straight])
@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("training", [False, True])
def test_the_child_computes_with_the_new_weight(kind: type[Mlp], looks: bool, training: bool) -> None:
    net = kind()
    other: Any = copy.deepcopy(net).train(training)
    apply_rules(net.eval(), ScaledRule(kind, looks=looks), example_inputs=X)
    net.train(training)
    factor = torch.tensor([2.0], requires_grad=True)
    output, expected = net(X), plainly(other, X, factor)
    assert torch.equal(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(dict(net.named_parameters())["adapters.default.factor"].grad, factor.grad)
    assert torch.equal(net.norm.running_mean, other.norm.running_mean)  # type: ignore[arg-type]
    assert_reversible(kind(), [ScaledRule(kind, looks=looks)], example_inputs=X)


def test_with_adapters_in_the_child_and_around_it() -> None:
    net = Mlp().eval()
    before, snapshot = net(X), Snapshot(net)
    apply_rules(net, LoraRule("up", rank=2), adapter="lora", example_inputs=X)
    lora: Any = net.up.adapters.lora  # type: ignore[union-attr]
    nn.init.normal_(lora.B)
    change = net.up(X) - F.linear(X, net.up.weight, net.up.bias)
    apply_rules(net, ScaledRule(Mlp, factor=2.0), adapter="a", example_inputs=X)
    apply_rules(net, ScaledRule(Mlp, factor=3.0), adapter="b", example_inputs=X)
    linear = F.linear(X, net.up.weight * 6, net.up.bias) + change
    torch.testing.assert_close(net(X), net.down(net.norm(F.gelu(linear))))
    remove(net, "a")
    linear = F.linear(X, net.up.weight * 3, net.up.bias) + change
    torch.testing.assert_close(net(X), net.down(net.norm(F.gelu(linear))))
    remove(net, "b")
    remove(net)
    assert snapshot.differences(net) == [] and torch.equal(net(X), before)


def test_hooks_compile_and_export() -> None:
    net = Mlp().eval()
    apply_rules(net, ScaledRule(Mlp), example_inputs=X)
    expected = net(X)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(X), expected)
    for strict in (True, False):
        torch.testing.assert_close(torch.export.export(net, (X,), strict=strict).module()(X), expected)
    seen: list[Any] = []
    net.up.register_forward_hook(lambda module, args, output: seen.append(output))
    net(X)
    assert torch.equal(seen[0], F.linear(X, net.up.weight * 2, net.up.bias))


def test_a_grandchild() -> None:
    outer = Outer().eval()
    expected = F.gelu(plainly(outer.inner, X, 2))
    apply_rules(outer, GrandchildRule(Outer), example_inputs=X)
    assert torch.equal(outer(X), expected)


def test_parameters_of_layers_are_values_to_compute_with() -> None:
    @rule("test-child-decay")
    class NormRule(Rule):
        """Subtracts the mean square of a weight inside the forward from the output."""

        def rewrite(self, site: Any) -> Any:
            (match,) = site.find(UP)
            return site.output - match.bindings["weight"].square().mean()

    net = Mlp().eval()
    expected = net(X) - net.up.weight.square().mean()
    apply_rules(net, NormRule(Mlp), example_inputs=X)
    torch.testing.assert_close(net(X), expected)
