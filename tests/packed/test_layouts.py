"""What a packed weight offers, on each layout: the dequantised values, the backend's own quantisation, its bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.packed.packed_weight import PackedWeight, packed_weight_of
from tests.support.quantised import BACKENDS, BY_NAME, QuantisedLinear

pytestmark = pytest.mark.usefixtures("quiet")
every_layout = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)


def build(backend: QuantisedLinear, bias: bool = True, weight: Tensor | None = None) -> tuple[nn.Module, PackedWeight]:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=bias)
    if weight is not None:
        linear.weight.data = weight.clone()
    try:
        module = backend.build(linear)
    except ImportError as error:
        pytest.skip(f"needs {backend.package}: {error}")
    packed = packed_weight_of(module)
    assert packed is not None
    return module, packed


def bits(packed: PackedWeight) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in packed.tensors().items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and tensor.shape == right[name].shape, name
        assert torch.equal(tensor.flatten().view(torch.uint8), right[name].flatten().view(torch.uint8)), name


@every_layout
def test_the_dequantised_weight_is_what_the_forward_multiplies_with(backend: QuantisedLinear) -> None:
    module, packed = build(backend, bias=False)
    weight = packed.dequantise()
    assert type(weight) is Tensor and weight.shape == packed.shape == (32, 64) and weight.dtype == packed.dtype
    x = torch.randn(5, 64)
    for training in (False, True):
        module.train(training)
        with torch.no_grad():
            y = module(x)
            rows = module(torch.eye(64)).T
        expected = F.linear(x, weight)
        assert (y - expected).norm() <= backend.slack * expected.norm()
        if packed.activations is None and backend.exact:
            assert torch.equal(rows, weight)  # a unit matrix picks out the numbers themselves
        assert (packed.activations is None) == backend.exact
        assert torch.equal(packed.dequantise(), weight)  # also after calls
    assert packed.nbytes < weight.numel() * 4 and packed.layout and packed.device == torch.device("cpu")


@every_layout
def test_refitted_codes_and_scales_are_the_backends_own(backend: QuantisedLinear) -> None:
    module, packed = build(backend)
    module(torch.randn(2, 64))
    before, fresh = bits(packed), torch.randn(32, 64) * torch.linspace(0.1, 2, 32)[:, None]
    made = packed.requantise(fresh)
    assert_equal(bits(packed), before)  # nothing changed
    _, other = build(backend, weight=fresh)
    assert_equal(made, bits(other))
    objects = (module.weight, type(module.weight))
    packed.write(made)
    assert (module.weight, type(module.weight)) == objects
    assert_equal(bits(packed), made)
    assert torch.equal(packed.dequantise(), other.dequantise())
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(module.eval()(x), other.module.eval()(x))  # the next call uses them
    packed.write(before)
    assert_equal(bits(packed), before)


@every_layout
def test_kept_scales_give_the_same_codes_for_the_same_numbers(backend: QuantisedLinear) -> None:
    _, packed = build(backend)
    before, weight = bits(packed), packed.dequantise()
    again = packed.requantise(weight, scales="keep")
    packed.write(again)
    assert torch.equal(packed.dequantise(), weight)
    new = packed.requantise(weight * 0.7, scales="keep")
    for name, tensor in new.items():
        if name not in ("weight", "qdata", "qweight"):
            assert torch.equal(tensor, before[name]), name
    packed.write(new)
    nearer = (packed.dequantise() - 0.7 * weight).norm()
    assert 0 < nearer < (weight - 0.7 * weight).norm()


@every_layout
def test_copies_have_weights_of_their_own(backend: QuantisedLinear) -> None:
    module, packed = build(backend)
    for _ in range(2):  # before a call and afterwards
        twin = copy.deepcopy(module)
        other = packed_weight_of(twin)
        assert other is not None and torch.equal(other.dequantise(), packed.dequantise())
        before = packed.dequantise()
        other.write(other.requantise(torch.randn(32, 64)))
        assert torch.equal(packed.dequantise(), before) and not torch.equal(other.dequantise(), before)
        x = torch.randn(2, 64)
        with torch.no_grad():
            expected = F.linear(x, other.dequantise(), twin.bias)  # type: ignore[arg-type]
            assert (twin(x) - expected).norm() <= backend.slack * expected.norm()
        module(torch.randn(2, 64))


def test_a_change_of_the_codes_is_seen_by_their_version() -> None:
    for name in ("bitsandbytes Linear4bit nf4", "bitsandbytes Linear8bitLt", "torchao int8"):
        _, packed = build(BY_NAME[name])
        versions = [tensor._version for tensor in packed.tensors().values()]
        packed.write(packed.requantise(torch.ones(32, 64)))
        assert all(tensor._version > old for tensor, old in zip(packed.tensors().values(), versions, strict=True))


@pytest.mark.parametrize("nested", [False, True])
def test_the_arrangement_for_processors_with_bfloat16(nested: bool) -> None:
    _, packed = build(BY_NAME["bitsandbytes Linear4bit nf4, double" if nested else "bitsandbytes Linear4bit nf4"])
    from bitsandbytes.functional import _convert_weight_packed_for_cpu  # type: ignore[import-untyped]

    before, weight, module = bits(packed), packed.dequantise(), packed.module
    module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu(
        module.weight.data, module.weight.quant_state
    )
    arranged, rounded = bits(packed), packed.dequantise()
    # The scales are rounded to bfloat16, so each number is off by its eps at most.
    assert set(arranged) == {"rearranged_weight", "rearranged_absmax"}
    torch.testing.assert_close(rounded, weight, rtol=2**-8, atol=0)
    packed.write(packed.requantise(rounded, scales="keep"))
    assert_equal(bits(packed), arranged)
    packed.write(before)
    assert_equal(bits(packed), before)
    assert torch.equal(packed.dequantise(), weight)
    packed.write(arranged)
    assert_equal(bits(packed), arranged)


def test_modules_that_are_not_quantised_have_none() -> None:
    bitsandbytes: Any = pytest.importorskip("bitsandbytes")

    assert packed_weight_of(nn.Linear(2, 2)) is None
    assert packed_weight_of(bitsandbytes.nn.Linear4bit(64, 32)) is None  # before it is moved
    assert packed_weight_of(bitsandbytes.nn.Linear8bitLt(64, 32)) is None  # quantised at each call
