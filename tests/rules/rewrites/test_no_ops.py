"""NoOpsRule and ShareRule beside the forward as it was: the same bits, with fewer operations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from surgery import PlanError, SurgeryWarning, apply_rules, remove, trace
from surgery.rules.rewrites import NoOpsRule, ShareRule
from tests.support.tiny import bert, gpt2, llama


class Calls(TorchFunctionMode):
    """Notes the names of the functions that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append((resolve_name(function) or "").rpartition(".")[2])
        return function(*args, **(kwargs or {}))


def calls_of(model: nn.Module, *inputs: Tensor) -> list[str]:
    with Calls() as calls:
        model(*inputs)
    return calls.names


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.none, self.same = nn.Linear(4, 4), nn.Dropout(0.5), nn.Dropout(0.0), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.same(self.none(self.up(x.float().to(torch.float32))))
        return F.dropout(self.drop(y), 0.5, self.training).exp()


def test_evaluation_runs_less_and_training_drops_out() -> None:
    model, x = Idle().eval(), torch.randn(3, 4)
    before, calls = model(x), calls_of(model, x)
    assert {"dropout", "float", "to"} <= {*calls}
    apply_rules(model, NoOpsRule(), example_inputs=x)
    assert torch.equal(model(x), before) and not {"dropout", "float"} & {*calls_of(model, x)}
    model.train()
    assert calls_of(model, x).count("dropout") == 2
    torch.manual_seed(0)
    output = model(x)
    remove(model)
    torch.manual_seed(0)
    assert torch.equal(output, model(x))


class Casts(nn.Module):
    """The dtype of a parameter decides the first cast; the second follows from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.float() * x.float()


def test_casts_follow_the_dtypes_of_later_calls() -> None:
    model, x = Casts(), torch.randn(3, 4)
    apply_rules(model, NoOpsRule(), example_inputs=x)
    assert calls_of(model, x).count("float") == 1
    assert torch.equal(model(x.half()), model.weight * x.half().float())
    half = model.half()
    assert half(x).dtype == half(x.half()).dtype == torch.float32


def test_a_layer_with_hooks_stays() -> None:
    model, seen = Idle().eval(), list[Any]()
    model.same.register_forward_hook(lambda module, args, output: seen.append(output))
    apply_rules(model, NoOpsRule(), example_inputs=torch.randn(3, 4))
    seen.clear()
    model(torch.randn(3, 4))
    assert len(seen) == 1


@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_models_keep_their_bits(make: Any) -> None:
    model, example = make()
    before = model.eval()(**example)[0]
    apply_rules(model, NoOpsRule(), example_inputs=example)
    assert torch.equal(model(**example)[0], before)
    remove(model)
    assert torch.equal(model(**example)[0], before)


class Twice(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a = torch.cat([x.exp() * 2, x.exp() * 2.0], -1) + x.exp().sum(-1, keepdim=True)
        return a * F.dropout(x.exp(), 0.5).sum() * F.dropout(x.exp(), 0.5).sum() * (x @ y.mT).sum() * (x @ y.mT).mean()


def test_equal_operations_run_once() -> None:
    model, inputs = Twice(), (torch.randn(3, 4), torch.randn(3, 4))
    torch.manual_seed(0)
    before = model(*inputs)
    counts = calls_of(model, *inputs)
    assert counts.count("exp") == 5
    apply_rules(model, ShareRule(), example_inputs=inputs)
    torch.manual_seed(0)
    assert torch.equal(model(*inputs), before)
    counts = calls_of(model, *inputs)
    assert counts.count("exp") == 1 and counts.count("dropout") == 2
    x = inputs[0].clone().requires_grad_()
    torch.manual_seed(0)
    (gradient,) = torch.autograd.grad(model(x, inputs[1]).sum(), x)
    remove(model)
    torch.manual_seed(0)
    (expected,) = torch.autograd.grad(model(x, inputs[1]).sum(), x)
    assert torch.allclose(gradient, expected, rtol=1e-5)


class Writing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.exp(), x.exp()
        a.mul_(2)
        return a + b


def test_forwards_that_write_in_place_stay() -> None:
    with pytest.raises(PlanError, match="finds nothing to do"):
        apply_rules(Writing(), ShareRule(), example_inputs=torch.randn(3))


class Several(nn.Module):
    """What it does depends on its arguments."""

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        return x.float() if scale is None else x * scale


def test_a_kind_of_call_without_anything_to_do_runs_as_it_is() -> None:
    model, x = Several(), torch.randn(3)
    apply_rules(model, NoOpsRule(), example_inputs=x)
    assert torch.equal(model(x, 2.0), x * 2) and torch.equal(model(x.double()), x.double().float())


class Unused(nn.Module):
    """A child that the call does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.other = Idle(), Idle()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_modules_that_a_call_does_not_reach_stay() -> None:
    model, x = Unused().eval(), torch.randn(3, 4)
    before = model(x)
    apply_rules(model, NoOpsRule(), example_inputs=x)
    assert torch.equal(model(x), before) and type(model.other) is Idle
    with pytest.raises(PlanError, match="never reaches"):
        apply_rules(Unused().eval(), NoOpsRule("other"), example_inputs=x)


class ChildCalledSelf(nn.Module):
    """As attention modules of BERT: a child has the name `self`, and other children are called after it."""

    def __init__(self) -> None:
        super().__init__()
        self.self, self.output = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.self(x) + self.self(x.exp())) + x.exp().sin()


def test_a_child_called_self_does_not_hide_the_module() -> None:
    model, x = ChildCalledSelf(), torch.randn(3, 4)
    before = model(x)
    graph = trace(model, x)
    assert torch.equal(graph(x), before) and torch.equal(copy.deepcopy(graph)(x), before)
    apply_rules(model, ShareRule(), example_inputs=x)
    assert torch.equal(model(x), before) and calls_of(model, x).count("exp") == 1


def test_modules_that_cannot_be_rewritten_stay_beside_others() -> None:
    first, second, x = Idle(), Idle(), torch.randn(3, 4)
    model = nn.Sequential(first, second).eval()
    before = model(x)
    second.forward = lambda x: Idle.forward(second, x)  # type: ignore[method-assign]
    with pytest.warns(SurgeryWarning, match="NoOpsRule leaves out 1: .* a forward was set on the instance"):
        apply_rules(model, NoOpsRule(), example_inputs=x)
    assert hasattr(type(first), "_surgery_base") and type(second) is Idle
    assert torch.equal(model(x), before)
    with pytest.raises(PlanError, match="a forward was set on the instance"):
        apply_rules(nn.Sequential(second).eval(), NoOpsRule("0"), example_inputs=x)
