"""Sites with many live adapters: the forward is written at its first call, and everything else works before it."""

from __future__ import annotations

import copy
import inspect
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import Rule, activate, apply_rules, merge, remove, route, rule, show, unmerge
from surgery.rules import LoraRule
from surgery.state.records import site_state
from surgery.testing import Snapshot
from surgery.weaving.deferred_class import DeferredRecipe
from surgery.weaving.generated_class import EAGER_LIMIT
from tests.support.line_counts import lines_of

MANY = EAGER_LIMIT + 4
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def stack(count: int = MANY, make: Callable[[], Any] = lambda: LoraRule("0", rank=2, init="random")) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    for index in range(count):
        apply_rules(model, make(), adapter=f"a{index}")
    return model


def unwritten(model: nn.Sequential) -> bool:
    return isinstance(vars(type(model[0]))["_surgery_recipe"], DeferredRecipe)


def plain(model: nn.Sequential, scale: float = 4.0) -> Tensor:
    """Returns the layer's output with all branches, in plain torch. LoRA's alpha is 8, its rank 2."""
    tensors = dict(model[0].named_parameters())
    y = F.linear(X, tensors["weight"], tensors["bias"])
    for name in model[0].adapters._modules:  # type: ignore[union-attr]
        A, B = (tensors[f"adapters.{name}.{key}"] for key in "AB")
        y = y + X @ A.t() @ B.t() * scale
    return y


def test_a_few_are_written_at_once_and_many_when_they_are_called() -> None:
    assert not unwritten(stack(EAGER_LIMIT))
    model = stack()
    assert unwritten(model) and isinstance(model[0], nn.Linear)
    cls = type(model[0])
    torch.testing.assert_close(model(X), plain(model))
    assert type(model[0]) is cls and not unwritten(model)
    model.train()
    torch.testing.assert_close(model(X), plain(model))


def test_sites_that_are_alike_share_the_class() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    for index in range(MANY):
        apply_rules(model, LoraRule(["0", "1", "2"], rank=2), adapter=f"a{index}")
    assert len({type(module) for module in model}) == 1


@pytest.mark.parametrize(
    "copy_model",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_copies(copy_model: Callable[[Any], Any]) -> None:
    model = stack()
    assert torch.equal(copy_model(model)(X), model(X))


def test_what_is_shown() -> None:
    model = stack()
    assert list(inspect.signature(model[0].forward).parameters) == ["input"]
    text = show(model, "0")
    assert text.count("LoraRule [a") >= MANY and "def forward(self, input)" in text
    assert list(inspect.signature(model[0].forward).parameters) == ["input"]


@pytest.mark.parametrize("called", [False, True])
def test_a_forward_that_was_bound_before_it_was_written(called: bool) -> None:
    """Like accelerate's hooks, which bind the forward."""
    model = stack()
    module: Any = model[0]
    module._old_forward = module.forward
    module.forward = types.MethodType(lambda self, x: self._old_forward(x), module)
    expected = plain(model)
    if called:
        torch.testing.assert_close(model(X), expected)
    apply_rules(model, LoraRule("0", rank=2), adapter="more")  # its B starts at zero
    torch.testing.assert_close(model(X), expected)
    remove(model)
    assert torch.equal(model(X), F.linear(X, module.weight, module.bias))


def test_other_verbs() -> None:
    model = stack()
    names = [f"a{index}" for index in range(MANY)]
    expected = plain(model)
    with route(model, ["a1", None, "a2"]):
        rows = model(X)
    base: Any = model[0]
    assert torch.equal(rows[1], F.linear(X, base.weight, base.bias)[1])
    torch.testing.assert_close(model(X), expected)
    with torch.no_grad():
        merge(model)
        torch.testing.assert_close(model(X), expected)
        unmerge(model)
    activate(model, names[:-1])
    assert unwritten(model)
    activate(model, names)
    torch.testing.assert_close(model(X), expected)
    while_training = torch.autograd.grad(model(X).sum(), model[0].adapters.a3.B)[0]  # type: ignore[union-attr]
    torch.testing.assert_close(while_training, torch.autograd.grad(expected.sum(), model[0].adapters.a3.B)[0])  # type: ignore[union-attr]


def test_compilers_see_what_was_written() -> None:
    def fresh(alpha: float) -> nn.Sequential:  # models that exist at the same time share classes
        model = stack(make=lambda: LoraRule("0", rank=2, alpha=alpha, init="random"))
        assert unwritten(model)
        return model

    model = fresh(3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), plain(model, 1.5))
    torch.testing.assert_close(compiled(X), model(X))  # compiled code orders the products differently
    assert not unwritten(model)
    model = fresh(5)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), plain(model, 2.5))


@rule("test-circle")
class CircleRule(Rule):
    """Computes the input from the output."""

    def rewrite(self, site: Any) -> None:
        site.replace(site.input, site.output * site.param("s", (1,)))


@rule("test-weight-by-bias")
class WeightByBias(Rule):
    def rewrite(self, site: Any) -> None:
        site.replace(site.weight, site.weight + site.bias[:, None] * site.param("s", (1,), 0.1))


@rule("test-bias-by-weight")
class BiasByWeight(Rule):
    def rewrite(self, site: Any) -> None:
        site.replace(site.bias, site.bias + site.weight.sum(1) * site.param("s", (1,), 0.1))


def test_errors_are_found_while_applying() -> None:
    model = stack()
    before = Snapshot(model)
    with pytest.raises(Exception, match="needs a value that is made from itself"):
        apply_rules(model, CircleRule("0"), adapter="circle")
    assert not before.differences(model)
    for index in range(2):
        apply_rules(model, WeightByBias("0"), adapter=f"w{index}")
    before = Snapshot(model)
    with pytest.raises(Exception, match="needs a value that is made from itself"):
        apply_rules(model, BiasByWeight("0"), adapter="b")  # each can be written alone, not both
    assert not before.differences(model)
    torch.testing.assert_close(model(X).shape, X.shape)


def test_the_work_is_in_proportion_to_the_adapters() -> None:
    model, classes = stack(0), []
    for index in range(48):
        apply_rules(model, LoraRule("0", rank=2, init="random"), adapter=f"a{index}")
        classes.append((type(model[0]), site_state(model[0]).woven))  # type: ignore[union-attr]  # keep classes alive
    first, second, third = (lines_of(lambda count=count: stack(count)) for count in (12, 24, 48))
    assert third - second < 2.2 * (second - first) and classes
