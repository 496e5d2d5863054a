"""transformers' Linears of 8-bit floats: their own kernels need a GPU, so a plain kernel stands in for them here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import PlanError, SurgeryWarning, apply_rules, merge, packed_weight_of, remove, unmerge
from surgery.rules import ExpertLoraRule, LoraRule

fp8: Any = pytest.importorskip("transformers.integrations.finegrained_fp8")
mxfp4: Any = pytest.importorskip("transformers.integrations.mxfp4")
transformers: Any = pytest.importorskip("transformers")
fbgemm: Any = pytest.importorskip("transformers.integrations.fbgemm_fp8")
row_wise: Any = pytest.importorskip("transformers.integrations.compressed_tensors")


def fill(module: Any, seed: int = 0) -> Any:
    """Codes and scales drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        module.weight.copy_(torch.randn(module.weight.shape, generator=generator).to(torch.float8_e4m3fn))
        scales: Tensor = module.weight_scale_inv if hasattr(module, "weight_scale_inv") else module.weight_scale
        scales.copy_(torch.exp2(torch.randint(-8, -4, scales.shape, generator=generator).float()))
    return module


LAYERS = {
    "blocks": lambda: fp8.FP8Linear(48, 40, block_size=(16, 16)),
    "powers of two": lambda: fp8.FP8Linear(48, 40, block_size=(16, 16), scale_fmt="ue8m0", has_bias=True),
    "one scale": lambda: fp8.FP8Linear(48, 40, has_bias=True),
    "rows": lambda: row_wise.CompressedTensorsFP8Linear(48, 40, has_bias=True),
    "fbgemm": lambda: fbgemm.FbgemmFp8Linear(48, 40, bias=True),
}
every_layer = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)


def reference(module: Any) -> Tensor:
    """The weight, one number at a time."""
    codes, weight = module.weight.float(), torch.empty(40, 48)
    for row in range(40):
        for column in range(48):
            if hasattr(module, "weight_scale"):
                scale = module.weight_scale.flatten()[row]
            else:
                scale = module.weight_scale_inv
                scale = scale if scale.dim() == 0 else scale[row // 16, column // 16]
            weight[row, column] = codes[row, column] * scale.float()
    return weight.detach()


@every_layer
def test_the_weight_is_codes_by_scales(build: Any) -> None:
    module = fill(build())
    packed = packed_weight_of(module)
    assert packed is not None and packed.shape == (40, 48) and packed.dtype is torch.float32 and packed.activations
    actual = packed.dequantise()
    assert torch.equal(actual, reference(module))
    again = packed.requantise(actual, scales="keep")
    for name, tensor in packed.tensors().items():
        assert torch.equal(tensor.flatten().view(torch.uint8), again[name].flatten().view(torch.uint8))
    weight = torch.randn(40, 48)
    packed.write(packed.requantise(weight))
    error = (packed.dequantise() - weight).abs()
    assert torch.equal(packed.dequantise(), reference(module))
    assert bool((error <= weight.abs() / 16 + 1e-2).all())  # three bits after the point
    packed.write(packed.requantise(torch.zeros(40, 48)))
    assert not packed.dequantise().any()
    twin = copy.deepcopy(module)
    assert torch.equal(packed_weight_of(twin).dequantise(), packed.dequantise())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["blocks", "one scale"])
def test_lora_is_added_to_the_kernels_output(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(x: Tensor, weight: Tensor, scales: Tensor, block: Any, bias: Any, *_: Any) -> Tensor:
        return F.linear(x, fp8._dequantize_fp8_weight(weight, scales, block, x.dtype), bias)

    monkeypatch.setattr(fp8, "fp8_linear", kernel)
    model: Any = nn.Sequential(fill(LAYERS[name]()))
    if model[0].bias is not None:
        nn.init.normal_(model[0].bias)  # type: ignore[arg-type]
    x = torch.randn(5, 48, requires_grad=True)
    base = model(x)
    apply_rules(model, LoraRule("all-linear", rank=4, alpha=6, init="random"))
    params: Any = model[0].adapters.default
    weight = packed_weight_of(model[0]).dequantise() + 1.5 * params.B @ params.A  # type: ignore[union-attr]
    expected = F.linear(x, weight, model[0].bias)  # type: ignore[arg-type]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model(x).sum().backward()
    assert params.A.grad is not None and params.B.grad is not None and x.grad is not None
    remove(model)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("name", ["rows", "fbgemm"])
def test_lora_is_added_to_the_output_of_a_kernel_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' stand-ins multiply codes, scale each row of the weight, and do not round the input."""

    def unrounded(x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return x, torch.ones(len(x))

    def scaled(x: Tensor, weight: Tensor, *, scale_b: Tensor, bias: Tensor, **_: Any) -> Tensor:
        return (x @ weight.float()) * scale_b + bias

    def by_rows(x: Tensor, weight: Tensor, _: Tensor, scales: Tensor, **__: Any) -> Tensor:
        return (x @ weight.float().T) * scales.T

    monkeypatch.setattr(row_wise, "quantize_fp8_per_row", unrounded)
    monkeypatch.setattr(row_wise, "_scaled_mm_rowwise", scaled)
    monkeypatch.setattr(fbgemm, "quantize_fp8_per_row", unrounded, raising=False)
    monkeypatch.setattr(torch.ops.fbgemm, "f8f8bf16_rowwise", by_rows, raising=False)
    model: Any = nn.Sequential(fill(LAYERS[name]()).requires_grad_(False)).eval()
    nn.init.normal_(model[0].bias)
    x, weight = torch.randn(2, 5, 48), reference(model[0])
    base = model(x)
    torch.testing.assert_close(base, F.linear(x, weight, model[0].bias), rtol=1e-4, atol=1e-4)  # the order of sums
    with pytest.warns(SurgeryWarning, match="gradient"):
        apply_rules(model, LoraRule("all-linear", rank=4, alpha=6, init="random"))
    params: Any = model[0].adapters.default
    expected = F.linear(x, weight + 1.5 * params.B @ params.A, model[0].bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    codes = model[0].weight.clone()
    merge(model, quantised="dequantise")
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert torch.equal(model[0].weight.view(torch.uint8), codes.view(torch.uint8))
    remove(model)
    assert torch.equal(model(x), base)


def test_layers_that_are_not_one_map_are_not_read() -> None:
    assert packed_weight_of(fp8.FP8GroupedLinear(48, 40, 2, block_size=(16, 16))) is None
    plain = fp8.FP8Linear(48, 40)
    plain.weight = nn.Parameter(torch.randn(40, 48))  # as after dequantising at load time
    assert packed_weight_of(plain) is None


def test_a_packed_stack_of_experts_is_refused_with_the_way() -> None:
    config = transformers.GptOssConfig(num_local_experts=2, intermediate_size=32, hidden_size=32)
    model = nn.Sequential(mxfp4.Mxfp4GptOssExperts(config))
    with pytest.raises(
        PlanError, match=r"gate_up_proj is a Parameter of torch.uint8[\s\S]*Mxfp4Config\(dequantize=True\)"
    ):
        apply_rules(model, ExpertLoraRule("0", rank=4))
