"""HQQ: the stand-in and, where the package is installed, `HQQLinear` itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from surgery import apply_rules, packed_weight_of, remove
from surgery.rules import LoraRule
from tests.support.packed_layers import HQQLinear

Load = Callable[[str], ModuleType]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_weight_is_what_the_forward_multiplies_with(axis: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = HQQLinear(nn.Linear(64, 32), axis=axis, dtype=dtype)
    packed = packed_weight_of(module)
    assert packed is not None and packed.shape == (32, 64) and packed.dtype is dtype
    assert packed.layout == f"4 bits, groups of 16 along axis {axis}"
    assert torch.equal(packed.dequantise(), module.reference())
    before = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    again = packed.requantise(packed.dequantise(), scales="keep")
    assert before.keys() == again.keys() and all(torch.equal(before[name], again[name]) for name in before)
    weight = torch.randn(32, 64)
    packed.write(packed.requantise(weight))
    assert torch.equal(packed.dequantise(), module.reference())
    assert (packed.dequantise() - weight).norm() < 0.1 * weight.norm()  # 4 bits in groups of 16


# Real layers -------------------------------------------------------------------------------------------------


def build(optional: Load, bits: int, axis: int, dtype: torch.dtype, as_float: bool = False) -> Any:
    hqq: Any = optional("hqq.core.quantize")
    settings = hqq.BaseQuantizeConfig(nbits=bits, group_size=16, axis=axis, view_as_float=as_float)
    torch.manual_seed(0)
    return hqq.HQQLinear(nn.Linear(64, 32), settings, compute_dtype=dtype, device="cpu")


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_real_layers_are_read_and_written(bits: int, axis: int, as_float: bool, optional: Load) -> None:
    module = build(optional, bits, axis, torch.float16, as_float)
    packed = packed_weight_of(module)
    assert packed is not None and packed.backend == "hqq"
    module.bias = None
    unit = torch.eye(64, dtype=torch.float16)
    assert torch.equal(packed.dequantise(), module(unit).t())
    before = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    again = packed.requantise(packed.dequantise(), scales="keep")
    assert all(torch.equal(before[name].view(torch.uint8), again[name].view(torch.uint8)) for name in before)
    weight = torch.randn(32, 64)
    hqq: Any = optional("hqq.core.quantize")
    made = hqq.HQQLinear.from_weights(
        weight, None, copy.deepcopy(module.quant_config) | {"offload_meta": False}, device="cpu"
    )
    packed.write(packed.requantise(weight))
    assert torch.equal(packed.dequantise(), made.dequantize()) and torch.equal(module(unit).t(), made.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_lora_on_real_layers(dtype: torch.dtype, optional: Load) -> None:
    model: Any = nn.Sequential(build(optional, 4, 1, dtype))
    weight, bias = model[0].dequantize().float(), model[0].bias.detach().float()
    x = torch.randn(5, 64).to(dtype)
    base = model(x).detach()
    apply_rules(model, LoraRule("all-linear", rank=4, alpha=6, init="random"))
    params: Any = model[0].adapters.default
    assert params.A.dtype == torch.float32
    expected = x.float() @ (weight + 1.5 * params.B @ params.A).t() + bias
    slack = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(model(x).float(), expected, rtol=slack, atol=slack)
    model(x).float().sum().backward()
    assert params.A.grad is not None and params.B.grad is not None
    remove(model)
    assert torch.equal(model(x), base)
