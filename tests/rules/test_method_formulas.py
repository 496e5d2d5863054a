"""The methods beside LoRA against their formulas: alone, in stacks, in half precision, compiled, quantised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from surgery import PlanError, apply_rules, merge, remove, unmerge
from surgery.rules import LoraRule
from surgery.testing import assert_reversible
from tests.support.methods import METHODS, Holder, assert_close, cases, disturbed, example, expected_of


@cases()
def test_the_method_is_its_formula(name: str, layer: str) -> None:
    method = METHODS[name]
    model, x = example(layer)
    base = copy.deepcopy(model)
    apply_rules(model, [method.rule], example_inputs=x)
    params = {key: tensor.detach().clone() for key, tensor in disturbed(model).items()}
    changed, _ = expected_of(model, base, method, params)
    with torch.no_grad():
        expected = functional_call(base, changed, x)
        live = model(x)
        assert (live - base(x)).abs().max() > 1e-3
        assert_close(live, expected, 1e-5)
        merge(model)
        assert type(model.m) is type(base.m)
        assert_close(model(x), expected, 1e-5)
        for path, tensor in changed.items():
            assert_close(model.get_parameter(path), tensor, 3e-6)
        assert torch.equal(unmerge(model)(x), live)
    remove(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))


@cases()
def test_in_and_out_leaves_no_trace(name: str, layer: str) -> None:
    model, x = example(layer)
    assert_reversible(model, [METHODS[name].rule], example_inputs=x)


@cases(among=("Linear", "Conv1D", "Conv2d", "Conv2d-groups"))
def test_gradients_are_those_of_the_formula(name: str, layer: str) -> None:
    method = METHODS[name]
    model, x = example(layer)
    base = copy.deepcopy(model)
    # Constrained OFT's projection passes gradients on as they are: here it is out of reach.
    method = replace(method, rule=method.rule.replace(eps=100.0)) if name == "coft" else method
    apply_rules(model, [method.rule])
    params = disturbed(model)
    weights = torch.randn_like(model(x))
    (model(x) * weights).sum().backward()
    twin = {key: tensor.detach().clone().requires_grad_(tensor.requires_grad) for key, tensor in params.items()}
    (functional_call(base, expected_of(model, base, method, twin)[0], x) * weights).sum().backward()
    for key, tensor in params.items():
        if tensor.requires_grad:
            assert tensor.grad is not None and twin[key].grad is not None, key
            assert_close(tensor.grad, twin[key].grad, 2e-5)  # type: ignore[arg-type]


@cases(among=("Linear", "Conv2d-1x1"))
def test_a_stack_merges_in_any_order(name: str, layer: str) -> None:
    method = METHODS[name]
    model, x = example(layer)
    before = copy.deepcopy(model)
    rules = {"a": method.rule, "b": LoraRule("m", rank=2, init="random"), "c": method.rule}
    rules["d"] = LoraRule("m", rank=2, dora=True)
    for order in ("abcd", "dbac", "acdb", "bdca"):
        for adapter in order:
            apply_rules(model, [rules[adapter]], adapter=adapter)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if ".adapters." in path:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            live = model(x)
            merge(model)
            assert_close(model(x), live, 1e-5)
            assert torch.equal(unmerge(model)(x), live)
        for adapter in reversed(order):
            remove(model, adapter)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_computes_in_float32(name: str, dtype: torch.dtype) -> None:
    method = METHODS[name]
    model, x = example("Linear")
    base = copy.deepcopy(model.to(dtype))
    apply_rules(model, [method.rule])
    params = {key: tensor.detach() for key, tensor in disturbed(model, 0.1).items()}
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in params.values())
    changed, _ = expected_of(model, base.float(), method, params)
    expected = functional_call(base, changed, x.to(dtype).float())
    actual = model(x.to(dtype))
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().max() < 0.05
    actual.float().sum().backward()
    assert all(p.grad is not None for path, p in model.named_parameters() if ".adapters." in path)


@pytest.mark.parametrize("name", METHODS)
def test_under_autocast(name: str) -> None:
    model, x = example("Linear")
    apply_rules(model, [METHODS[name].rule])
    disturbed(model)
    whole = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(x)
    actual.float().sum().backward()
    assert actual.dtype == torch.bfloat16
    assert (actual.detach().float() - whole).abs().max() <= 0.03 * max(1.0, float(whole.abs().max()))


@pytest.mark.parametrize("name", METHODS)
def test_it_compiles_and_exports(name: str) -> None:
    torch._dynamo.reset()  # a class of forwards is compiled only so often
    model, x = example("Linear")
    apply_rules(model, [METHODS[name].rule])
    disturbed(model)
    with torch.no_grad():
        live = model(x)
        assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), live)
        assert_close(torch.export.export(model.eval(), (x,)).module()(x), live)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_on_a_quantised_linear(name: str, optional: Callable[[str], Any]) -> None:
    bnb = optional("bitsandbytes")
    method = METHODS[name]
    layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32)
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    model, x = Holder(layer.to("cpu")), torch.randn(3, 64)
    weight = model(torch.eye(64)).T - layer.bias[:, None]
    apply_rules(model, [method.rule])
    params = {key: tensor.detach() for key, tensor in disturbed(model).items()}
    changed, bias = method.by_hand(weight.detach(), layer.bias.detach(), params, method.rule)
    assert_close(model(x), F.linear(x, changed, bias), 1e-4)
    with pytest.raises(PlanError, match="quantised"):
        merge(model)


@pytest.mark.parametrize("name", METHODS)
def test_it_starts_at_random_where_asked(name: str) -> None:
    model, x = example("Linear")
    plain = model(x)
    apply_rules(model, [METHODS[name].rule.replace(init="random")])
    assert (model(x) - plain).abs().max() > 1e-4
