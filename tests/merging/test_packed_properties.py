"""Merging into quantised weights and unmerging restores every bit, over layouts, rules, dtypes and ways to merge."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from surgery import PlanError, SurgeryError, apply_rules, merge, synced, unmerge
from surgery.packed.packed_weight import packed_weight_of
from surgery.rules import BiasRule, BoftRule, HraRule, IA3Rule, LohaRule, LoraRule, OftRule, RoadRule, VeraRule
from surgery.testing import Snapshot
from tests.support.packed_layers import HQQLinear, QuantLinear, TorchLinear, WQLinear_GEMM
from tests.support.quantised import BACKENDS

EXAMPLES = int(os.environ.get("SURGERY_EXAMPLES", "0")) or 10
LAYOUTS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "gptq v1": lambda linear: QuantLinear(linear),
    "gptq v2": lambda linear: TorchLinear(linear, bits=3),
    "awq": lambda linear: WQLinear_GEMM(linear),
    "hqq": lambda linear: HQQLinear(linear),
    **{backend.name: backend.build for backend in BACKENDS},
}
RULES: list[Any] = [
    LoraRule("all-linear", rank=2, init="random"), LoraRule("0", rank=2, dora=True, init="random"),
    LohaRule("0", rank=2),
    OftRule("0", block_size=4), HraRule("0", rank=2), IA3Rule("0", feedforward=()), VeraRule("0", rank=4),
    BoftRule("0", block_size=4), RoadRule("0"), BiasRule(["0"]),
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")


def model_of(layout: str, bias: bool) -> nn.Sequential:
    make = LAYOUTS[layout]
    return nn.Sequential(make(nn.Linear(64, 64, bias=bias)), nn.Tanh(), make(nn.Linear(64, 32)), nn.Linear(32, 4))


def disturb(model: nn.Module, size: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=size)


def bits(model: nn.Module) -> dict[str, bytes]:
    """All stored bits of the model: those of its state dict, and the codes and scales of packed weights."""
    tensors = {f"{path}.{k}": t for path, m in model.named_modules() if (p := packed_weight_of(m)) for k, t in _all(p)}
    tensors |= {name: tensor for name, tensor in model.named_parameters() if type(tensor) is nn.Parameter}
    return {
        name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
    }


def _all(packed: Any) -> list[tuple[str, torch.Tensor]]:
    return list(packed.tensors().items())


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_unmerging_restores_every_bit(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    bias = data.draw(st.booleans())
    try:
        model = model_of(layout, bias)
    except ImportError:
        return
    rule = data.draw(st.sampled_from(RULES))
    if not bias and isinstance(rule, BiasRule):
        return
    try:
        apply_rules(model, rule)
    except PlanError:  # a bias that is a buffer does not train
        return
    disturb(model, data.draw(st.sampled_from([1e-3, 0.1, 1.0])))
    options: dict[str, Any] = {"quantised": data.draw(st.sampled_from(["dequantise", "requantise"]))}
    options["keep"] = data.draw(st.sampled_from(["record", "copy"]))
    options["limit"] = data.draw(st.sampled_from([None, None, 0.1]))
    if options["quantised"] == "dequantise":
        options["dtype"] = data.draw(st.sampled_from([None, torch.bfloat16, torch.float64]))
        options["rounding"] = data.draw(st.sampled_from(["nearest", "stochastic", "error-feedback"]))
    x = torch.randn(6, 64)
    runs = options.get("dtype") is None
    if runs and data.draw(st.booleans()):
        options["example_inputs"] = torch.randn(20, 64)
    live, before, names = model(x), bits(model), [list(layer.__dict__) for layer in model]
    start, keys = Snapshot(model) if "Linear4bit" not in layout else None, list(model.state_dict())
    try:
        report = merge(model, **options)
    except SurgeryError as error:
        assert options["limit"] is not None or "can't be merged" in str(error), error
    else:
        assert all(loss.norm is not None for loss in report.loss.tensors if loss.tensor == "weight")
        if options["quantised"] == "dequantise":
            for loss in report.loss.tensors:
                assert type(model.get_submodule(loss.site)) is nn.Linear
            if runs and "dynamic" not in layout and "8bit" not in layout and not isinstance(rule, BiasRule):
                torch.testing.assert_close(model(x), live, rtol=5e-2, atol=5e-2)
        other = data.draw(st.sampled_from(["", "copy", "pickle"]))
        again = copy.deepcopy(model) if other == "copy" else model
        pickled = other == "pickle" and "torchao" not in layout  # whose tensors can't be pickled
        again = pickle.loads(pickle.dumps(model)) if pickled else again
        if again is not model:
            unmerge(again)
            assert bits(again) == before
        unmerge(model)
    assert bits(model) == before and torch.equal(model(x), live)
    assert [list(layer.__dict__) for layer in model] == names and list(model.state_dict()) == keys
    assert start is None or not start.differences(model)


@pytest.mark.parametrize("layout", ["gptq v1", "awq", "hqq"])
def test_a_sync_gives_what_a_merge_puts_there(layout: str) -> None:
    torch.manual_seed(0)
    model = apply_rules(model_of(layout, True), RULES[0])
    before = bits(model)
    with synced(model, quantised="dequantise") as tensors:
        got = dict(tensors)
    assert bits(model) == before
    merge(model, quantised="dequantise")
    assert all(torch.equal(got[f"{path}.weight"], model.get_submodule(path).weight) for path in "023")  # type: ignore[arg-type,union-attr]
    assert list(got) == [f"{path}.{name}" for path in "023" for name in ("weight", "bias")]
