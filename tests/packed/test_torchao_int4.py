"""torchao's `Int4Tensor`, beside torchao's own arithmetic of it. Plain kernels stand in for the GPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import apply_rules, merge, packed_stacks_of, packed_weight_of, unmerge
from surgery.rules import ExpertLoraRule, LoraRule

api: Any = pytest.importorskip("torchao.prototype.gptq.api")
int4: Any = pytest.importorskip("torchao.quantization.quantize_.workflows.int4.int4_tensor")
GROUP = 32
pytestmark = pytest.mark.filterwarnings("ignore:.*no gradient passes:surgery.errors.SurgeryWarning")


def packed(weight: Tensor) -> Any:
    """A weight (out, in) or a stack of weights as torchao stores it, by its documented form."""
    if weight.dim() == 3:
        parts = [packed(matrix) for matrix in weight]
        codes, scales, shifts = (torch.stack([getattr(p, n) for p in parts]) for n in ("qdata", "scale", "zero_point"))
        return int4.Int4Tensor(codes, scales, shifts, [1, 1, GROUP], weight.shape)
    groups = weight.float().unflatten(1, (-1, GROUP))
    scales = ((groups.amax(2) - groups.amin(2)) / 15).T.contiguous().to(weight.dtype)
    shifts = (groups.amin(2).T + scales * 8).contiguous().to(weight.dtype)
    codes = api._int4_row_quantize_zp_precomputed_qparams(weight, scales, shifts, GROUP)
    pairs = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    return int4.Int4Tensor(pairs.contiguous(), scales, shifts, [1, GROUP], weight.shape)


def numbers(tensor: Any) -> Tensor:
    """The numbers of an `Int4Tensor`, one code at a time, and by torchao's function."""
    if tensor.dim() == 3:
        return torch.stack([numbers(packed_slice(tensor, index)) for index in range(len(tensor))])
    rows = [[code for byte in row for code in (byte & 15, (byte >> 4) & 15)] for row in tensor.qdata.tolist()]
    signed = torch.tensor([[code - 16 if code > 7 else code for code in row] for row in rows])
    return api._int4_row_dequantize_zp(signed, tensor.scale.float(), tensor.zero_point.float(), GROUP)


def packed_slice(tensor: Any, index: int) -> Any:
    parts = (getattr(tensor, name)[index] for name in ("qdata", "scale", "zero_point"))
    return int4.Int4Tensor(*parts, [1, GROUP], tensor.shape[1:])


@pytest.fixture(autouse=True)
def plain_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(x: Tensor, codes: Tensor, scales: Tensor, shifts: Tensor) -> Tensor:
        shape = torch.Size((codes.shape[0], codes.shape[1] * 2))
        return F.linear(x, numbers(int4.Int4Tensor(codes, scales, shifts, [1, GROUP], shape)).to(x.dtype))

    monkeypatch.setattr(torch.ops.mslk, "bf16i4bf16_rowwise", kernel, raising=False)


def linear(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(64, 16).to(dtype).requires_grad_(False)
    layer.weight = nn.Parameter(packed(layer.weight.detach()), requires_grad=False)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_is_read_and_written(dtype: torch.dtype) -> None:
    layer = linear(dtype)
    weight: Any = packed_weight_of(layer)
    assert (weight.backend, weight.shape, weight.dtype, weight.layout) == (
        "torchao",
        (16, 64),
        dtype,
        "int4, groups of 32",
    )
    expected = numbers(layer.weight)
    torch.testing.assert_close(
        weight.dequantise().float(), expected, rtol=0 if dtype is torch.float32 else 2**-8, atol=1e-7
    )
    before = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    kept = weight.requantise(expected, scales="keep")
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
    new = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    made, theirs = weight.requantise(new), packed(new)
    torch.testing.assert_close(made["scale"], theirs.scale)
    if dtype is torch.float32:
        assert torch.equal(made["qdata"], theirs.qdata)
    weight.write(made)
    off = (weight.dequantise().float() - new.float()).abs().unflatten(1, (-1, GROUP)).amax(2)
    assert bool((off <= made["scale"].T.float() * (0.51 if dtype is torch.float32 else 0.7)).all())  # half a step


def test_lora_and_merges_on_a_linear() -> None:
    model: Any = apply_rules(nn.Sequential(linear()), LoraRule("0", rank=2, init="random"))
    x, box = torch.randn(3, 64), model[0].adapters.default
    expected = F.linear(x, numbers(model[0].weight) + 4.0 * box.B @ box.A, model[0].bias)
    torch.testing.assert_close(model(x), expected)
    before = {name: tensor.clone() for name, tensor in packed_weight_of(model[0]).tensors().items()}  # type: ignore[union-attr]
    live = model(x).detach()
    for mode in ("dequantise", "requantise"):
        merge(model, quantised=mode, limit=None)  # type: ignore[arg-type]
        torch.testing.assert_close(model(x), live, rtol=0, atol=1e-4 if mode == "dequantise" else 1.0)
        unmerge(model)
        now = packed_weight_of(model[0]).tensors()  # type: ignore[union-attr]
        assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
        assert torch.equal(model(x), live)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 32, 64), requires_grad=False)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return F.linear(x, self.up[expert])


def test_stacks_of_experts() -> None:
    quantised, plain = Experts(), Experts()
    quantised.up = nn.Parameter(packed(quantised.up.detach()), requires_grad=False)
    stack = packed_stacks_of(quantised)["up"]
    torch.testing.assert_close(stack.dequantise(), numbers(quantised.up))  # torchao's function adds in another order
    plain.up.copy_(stack.dequantise())
    assert stack.layout == "int4, groups of 32"
    assert torch.equal(stack.dequantise_experts(torch.tensor([2, 0])), plain.up[[2, 0]])
    before = {name: tensor.clone() for name, tensor in stack.tensors().items()}
    results = []
    for module in (quantised, plain):
        model: Any = nn.ModuleList([module])
        torch.manual_seed(1)
        apply_rules(model, ExpertLoraRule("0", rank=2, init="random"))
        y = module(torch.ones(2, 64), 1)
        y.sum().backward()
        results.append([y.detach(), *(parameter.grad for parameter in model[0].adapters.parameters())])
        merge(model, quantised="dequantise")
        results[-1].append(module.up.detach().clone())
        unmerge(model)
    assert all(map(torch.equal, *results))
    assert all(
        torch.equal(packed_stacks_of(quantised)["up"].tensors()[name], tensor) for name, tensor in before.items()
    )
