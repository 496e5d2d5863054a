"""The methods beside LoRA against PEFT with equal tensors: outputs, gradients, merged weights, dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from surgery import apply_rules, merge
from tests.support.methods import (
    METHODS,
    Holder,
    assert_close,
    cases,
    example,
    in_peft,
    needs_peft,
    take_over,
    theirs_of,
)


@needs_peft
@pytest.mark.filterwarnings("ignore")
@cases("in_peft")
def test_given_the_same_tensors_it_is_pefts(name: str, layer: str) -> None:
    method = METHODS[name]
    model, x = example(layer)
    theirs, ours = in_peft(model, method), apply_rules(model, [method.rule])
    wrapped = theirs.base_model.model.m
    tensors = theirs_of(wrapped, method)
    with torch.no_grad():
        for tensor in tensors.values():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    mine: Any = ours.get_submodule("m.adapters.default")
    take_over(tensors, mine.tensors())
    actual, expected = ours(x), theirs(x)
    assert_close(actual, expected, 3e-6)
    weights = torch.randn_like(expected)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    for key, tensor in tensors.items():
        # PEFT's are of another function: test_peft_gives_loha_gradients_of_another_function
        if tensor.requires_grad and not ("t1" in tensors and key in ("w1_a", "w2_a")):
            assert tensor.grad is not None
            assert_close(mine.tensors()[key].grad, tensor.grad.view(mine.tensors()[key].shape), 1e-5)
    theirs.eval().merge_adapter()
    merge(ours.eval())
    for key, tensor in wrapped.base_layer.named_parameters():
        assert_close(ours.get_parameter(f"m.{key}"), tensor, 3e-6)


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.in_peft])
def test_it_starts_as_in_peft(name: str) -> None:
    """Zeros and ones where PEFT has them; random tensors with its spread."""
    method = METHODS[name]
    model = Holder(nn.Linear(256, 256))
    if name == "vera":
        torch.manual_seed(5)
    theirs = theirs_of(in_peft(model, method).base_model.model.m, method)
    ours: Any = apply_rules(model, [method.rule]).get_submodule("m.adapters.default")
    for key, tensor in theirs.items():
        mine = ours.tensors()[key]
        if name == "vera":
            assert torch.equal(mine, tensor), key
        else:
            deviations = [float(t.std()) if t.numel() > 1 else 0.0 for t in (mine, tensor)]
            if 0 < tensor.numel() < 100:
                assert (deviations[0] > 0) == (deviations[1] > 0), key
                continue
            assert deviations[0] == pytest.approx(deviations[1], rel=0.2, abs=1e-7), key
            assert float(mine.mean()) == pytest.approx(float(tensor.mean()), abs=0.2 * deviations[1] + 1e-7)


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, peft_field", [("vera", "vera_dropout"), ("miss-uneven", "miss_dropout")])
def test_a_seed_drops_out_the_same_inputs(name: str, peft_field: str) -> None:
    method = METHODS[name]
    model, x = example("Linear")
    theirs = in_peft(model, method, **{peft_field: 0.5})
    ours = apply_rules(model, [method.rule.replace(dropout=0.5)])
    mine: Any = ours.get_submodule("m.adapters.default")
    tensors = theirs_of(theirs.base_model.model.m, method)
    with torch.no_grad():
        tensors["b" if name == "vera" else "block"].normal_()
    take_over(tensors, mine.tensors())
    outputs = []
    for adapted in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        outputs.append(adapted(x))
    assert_close(*outputs)
