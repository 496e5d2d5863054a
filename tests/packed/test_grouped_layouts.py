"""GPTQ and AWQ: the packed buffers give the weight that the module's own forward multiplies with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from surgery.packed.bit_packing import pack_words, unpack_words
from surgery.packed.packed_weight import packed_weight_of
from tests.support.packed_layers import QuantLinear, TorchLinear, WQLinear_GEMM, pack_columns

Build = Callable[[nn.Linear], Any]


def shuffled(count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(1))


LAYERS: dict[str, Build] = {
    **{f"gptq v1 {bits}": lambda linear, bits=bits: QuantLinear(linear, bits=bits) for bits in (2, 3, 4, 8)},
    **{f"gptq v2 {bits}": lambda linear, bits=bits: TorchLinear(linear, bits=bits) for bits in (2, 3, 4, 8)},
    "gptq symmetric": lambda linear: QuantLinear(linear, symmetric=True),
    "gptq act-order": lambda linear: QuantLinear(linear, order=shuffled(linear.in_features)),
    "gptq one group": lambda linear: TorchLinear(linear, group_size=-1),
    "gptq last group is shorter": lambda linear: TorchLinear(linear, group_size=40),
    "awq": lambda linear: WQLinear_GEMM(linear),
}
every_layer = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)


def linear(inner: int = 64, out: int = 32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inner, out)


@every_layer
def test_the_weight_is_what_the_forward_multiplies_with(build: Build) -> None:
    module = build(linear())
    packed = packed_weight_of(module)
    assert packed is not None and packed.shape == (32, 64) and packed.dtype == torch.float16
    assert torch.equal(packed.dequantise(), module.reference())
    assert packed.device == torch.device("cpu") and packed.nbytes < 32 * 64 * 2
    assert str(getattr(module, "bits", 4)) in packed.layout


@every_layer
def test_the_dequantised_weight_is_quantised_to_the_same_codes(build: Build) -> None:
    module = build(linear())
    packed = packed_weight_of(module)
    assert packed is not None
    before = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    again = packed.requantise(packed.dequantise(), scales="keep")
    assert before.keys() == again.keys() and all(torch.equal(before[name], again[name]) for name in before)


@every_layer
def test_new_values_are_within_half_a_step(build: Build) -> None:
    module = build(linear())
    packed = packed_weight_of(module)
    assert packed is not None
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    weight[0] = weight[0].abs()  # its zero point is the lowest code, which version 1 cannot store
    weight[1] = 0
    packed.write(packed.requantise(weight))
    actual = packed.dequantise().float()
    assert torch.equal(actual, module.reference().float()) and not actual[1].any()
    bits = getattr(module, "bits", 4)
    span = weight.amax(1).clamp_min(0) - weight.amin(1).clamp_max(0)
    if bool((packed.tensors()["qzeros"] == packed.tensors()["qzeros"][0, 0]).all()):
        span = 2 * weight.abs().amax(1)
    # Half a step, and what the rounding of a zero point and of a float16 scale move the ends of the grid by.
    slack = span / (2**bits - 2) * (1 + 2**bits * 2e-3)
    assert bool(((actual - weight).abs().amax(1) <= slack).all())


@every_layer
def test_copies_and_state_dicts_keep_the_weight(build: Build) -> None:
    module = build(linear())
    expected = packed_weight_of(module).dequantise()  # type: ignore[union-attr]
    other = build(nn.Linear(64, 32))
    assert not torch.equal(packed_weight_of(other).dequantise(), expected)  # type: ignore[union-attr]
    other.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), other):
        assert torch.equal(packed_weight_of(twin).dequantise(), expected)  # type: ignore[union-attr]


@every_layer
def test_sizes_are_known_on_the_meta_device(build: Build) -> None:
    packed = packed_weight_of(build(linear()).to("meta"))
    assert packed is not None and packed.shape == (32, 64) and packed.dequantise().shape == (32, 64) and packed.layout


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("count", [32, 40, 61])
def test_words_hold_codes_as_one_stream_of_bits(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (count, 3), generator=torch.Generator().manual_seed(0))
    words = pack_columns(codes, bits)
    assert torch.equal(unpack_words(words, bits, count).long(), codes)
    assert torch.equal(pack_words(codes.to(torch.uint8), bits, len(words)), words)


def test_layouts_that_a_kernel_rearranges_are_not_read() -> None:
    module = QuantLinear(linear())
    marlin = type("QuantLinear", (QuantLinear,), {"__module__": "auto_gptq.nn_modules.qlinear.qlinear_marlin"})
    module.__class__ = marlin
    assert packed_weight_of(module) is None
    assert packed_weight_of(nn.Linear(2, 2)) is None
