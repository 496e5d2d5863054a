"""optimum-quanto's frozen layers, where the package is installed."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_rules, merge, packed_weight_of, remove, unmerge
from surgery.rules import LoraRule

Load = Callable[[str], ModuleType]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # 4 bits in bfloat16 have a kernel of their own on a CPU


def build(optional: Load, kind: str, dtype: torch.dtype, weight: Tensor | None = None) -> Any:
    quanto: Any = optional("optimum.quanto")
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(256, 32)).to(dtype)
    if weight is not None:
        model[0].weight.data.copy_(weight)
    quanto.quantize(model, weights=getattr(quanto, kind))
    quanto.freeze(model)
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["qint2", "qint4", "qint8", "qfloat8", "qfloat8_e5m2"])
def test_layers_are_read_and_written(kind: str, dtype: torch.dtype, optional: Load) -> None:
    model = build(optional, kind, dtype)
    packed = packed_weight_of(model[0])
    assert packed is not None and packed.backend == "optimum-quanto" and packed.shape == (32, 256)
    unit = torch.eye(256, dtype=dtype)
    with torch.no_grad():
        model[0].bias.zero_()
        assert torch.equal(packed.dequantise(), model(unit).t())
    before = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    again = packed.requantise(packed.dequantise(), scales="keep")
    assert all(torch.equal(before[name].view(torch.uint8), again[name].view(torch.uint8)) for name in before)

    weight = torch.randn(32, 256).to(dtype)
    made = packed_weight_of(build(optional, kind, dtype, weight)[0])
    assert made is not None
    packed.write(packed.requantise(weight))
    assert torch.equal(packed.dequantise(), made.dequantise())
    packed.write(packed.requantise(torch.zeros_like(weight)))
    assert not packed.dequantise().any()


@pytest.mark.parametrize("kind", ["qint4", "qint8", "qfloat8"])
def test_lora_is_plain_arithmetic(kind: str, optional: Load) -> None:
    model = build(optional, kind, torch.float32)
    packed = packed_weight_of(model[0])
    assert packed is not None
    weight, x = packed.dequantise(), torch.randn(5, 256)
    base = model(x).detach()
    apply_rules(model, LoraRule("all-linear", rank=4, alpha=6, init="random"))
    params = model[0].adapters.default
    expected = x @ (weight + 1.5 * params.B @ params.A).t() + model[0].bias
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model(x).sum().backward()
    assert params.A.grad is not None and params.B.grad is not None
    remove(model)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("kind", ["qint4", "qint8", "qfloat8"])
@pytest.mark.parametrize("how", ["dequantise", "requantise"])
def test_merging_and_its_inverse(kind: str, how: str, optional: Load) -> None:
    model, x = build(optional, kind, torch.float32), torch.randn(5, 256)
    apply_rules(model, LoraRule("all-linear", rank=4, init="random"))
    live = model(x).detach()
    packed = packed_weight_of(model[0])
    assert packed is not None
    before = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    if how == "dequantise":
        merge(model, quantised="dequantise")
        assert isinstance(model[0], nn.Linear) and packed_weight_of(model[0]) is None
        torch.testing.assert_close(model(x), live, rtol=1e-4, atol=1e-4)
    else:
        merge(model, quantised="requantise", limit=None)
        assert (model(x) - live).norm() < 0.2 * live.norm()  # 4 bits in groups of 128
    unmerge(model)
    assert torch.equal(model(x), live)
    packed = packed_weight_of(model[0])
    assert packed is not None
    for name, tensor in packed.tensors().items():
        assert torch.equal(before[name].view(torch.uint8), tensor.view(torch.uint8))


def test_a_layer_that_is_not_frozen_has_an_ordinary_weight(optional: Load) -> None:
    quanto: Any = optional("optimum.quanto")
    model = nn.Sequential(nn.Linear(64, 32))
    quanto.quantize(model, weights=quanto.qint8)
    assert packed_weight_of(model[0]) is None
