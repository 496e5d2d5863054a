"""Stand-ins for quantised layers whose packages need a GPU or are not installed: their class names and buffers.

Codes are packed and unpacked with Python's integers, one code at a time, and each forward multiplies with that weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


def pack_bits(codes: Sequence[int], bits: int) -> list[int]:
    """Signed 32-bit words that hold the codes one after the other, the least significant bits first."""
    stream = sum(int(code) << (index * bits) for index, code in enumerate(codes))
    words = [(stream >> (32 * index)) & 0xFFFFFFFF for index in range(-(-len(codes) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def unpack_bits(words: Sequence[int], bits: int, count: int) -> list[int]:
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
    return [(stream >> (index * bits)) & (2**bits - 1) for index in range(count)]


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """Packs along the first dimension."""
    return torch.tensor([pack_bits(column, bits) for column in codes.t().tolist()], dtype=torch.int32).t().contiguous()


def unpack_columns(words: Tensor, bits: int, count: int) -> Tensor:
    return torch.tensor([unpack_bits(column, bits, count) for column in words.t().tolist()]).t()


class _GroupedLinear(nn.Module):
    """A map with codes, scales and zero points for groups of inputs, drawn from a plain weight."""

    scales: Tensor
    qweight: Tensor
    qzeros: Tensor
    bias: Any

    def reference(self) -> Tensor:
        """The weight (out, in) in the dtype of the scales."""
        raise NotImplementedError


def _multiply(self: _GroupedLinear, x: Tensor) -> Tensor:
    y = x @ self.reference().to(x.dtype).t()
    return y if self.bias is None else y + self.bias.to(x.dtype)


def _grid(weight: Tensor, groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Float16 scales, zero points and codes of a weight (in, out), from the least and greatest of each group."""
    highest = 2**bits - 1
    parts = [weight[groups == group] for group in range(int(groups.max()) + 1)]
    least = torch.stack([part.min(0).values.clamp(max=0) for part in parts])
    greatest = torch.stack([part.max(0).values.clamp(min=0) for part in parts])
    if symmetric:
        greatest = torch.maximum(-least, greatest)
        least = -greatest
    scales = ((greatest - least) / highest).half()
    zeros = torch.full(scales.shape, (highest + 1) // 2) if symmetric else (-least / scales.float()).round().long()
    zeros = zeros.clamp(1, highest)
    codes = ((weight / scales[groups].float()).round() + zeros[groups]).clamp(0, highest).long()
    return scales, zeros, codes


class QuantLinear(_GroupedLinear):
    """As auto-gptq's: version 1 of the format, which stores zero points minus one. Its sizes are `infeatures`, …"""

    stored_offset = 1
    forward = _multiply

    def __init__(
        self,
        linear: nn.Linear,
        bits: int = 4,
        group_size: int = 16,
        order: Tensor | None = None,
        symmetric: bool = False,
    ):
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        self.bits, self.group_size = bits, group_size if group_size > 0 else linear.in_features
        groups = torch.arange(self.infeatures) // self.group_size
        groups = groups if order is None else groups[order]
        scales, zeros, codes = _grid(linear.weight.detach().float().t(), groups, bits, symmetric)
        self.register_buffer("qweight", pack_columns(codes, bits))
        self.register_buffer("qzeros", pack_columns((zeros - self.stored_offset).t(), bits).t().contiguous())
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", groups.to(torch.int32))
        bias = linear.bias
        self.register_buffer("bias", None if bias is None else bias.detach().half())

    def reference(self) -> Tensor:
        groups: Any = self.g_idx
        codes = unpack_columns(self.qweight, self.bits, len(groups))
        zeros = unpack_columns(self.qzeros.t(), self.bits, self.scales.shape[1]).t() + self.stored_offset
        return (self.scales[groups.long()] * (codes - zeros[groups.long()])).t()


class TorchLinear(QuantLinear):
    """As gptqmodel's: version 2 of the format, and a `weight` that is not a tensor."""

    REQUIRES_FORMAT_V2 = True
    stored_offset = 0

    def __init__(self, linear: nn.Linear, **settings: Any):
        super().__init__(linear, **settings)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight(self) -> object:
        return object()


class TorchAtenLinear(nn.Module):
    """As gptqmodel's after its first call in evaluation: codes for torch's CPU kernel, the inputs sorted by group."""

    def __init__(self, linear: nn.Linear, group_size: int = 32, order: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features, self.group_size = linear.in_features, linear.out_features, group_size
        self.linear_mode, self.bias = "inference", None if linear.bias is None else linear.bias.detach().half()
        self.ret_idx = torch.arange(self.in_features) if order is None else order
        groups = torch.arange(self.in_features) // group_size
        weight = linear.weight.detach().float().t()[self.ret_idx]
        scales, zeros, codes = _grid(weight, groups, 4, symmetric=False)
        pack: Any = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        self.register_buffer("qweight", pack(codes.t().int().contiguous(), 1))
        self.scales_and_zeros = torch.stack((scales, (scales * (8 - zeros)).half()), 2).contiguous()
        self.numbers = (self.scales_and_zeros[groups, :, 0].float() * (codes - 8)).t()
        self.numbers += self.scales_and_zeros[groups, :, 1].float().t()

    def reference(self) -> Tensor:
        weight = torch.empty_like(self.numbers)
        weight[:, self.ret_idx] = self.numbers
        return weight

    def forward(self, x: Tensor) -> Tensor:
        kernel: Any = torch.ops.aten._weight_int4pack_mm_for_cpu
        rows = x.reshape(-1, self.in_features)[:, self.ret_idx].contiguous()
        with torch.no_grad():
            y = kernel(rows, self.qweight, self.group_size, self.scales_and_zeros)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class WQLinear_GEMM(_GroupedLinear):  # noqa: N801  # AutoAWQ's name
    """As AutoAWQ's: packed along the outputs, eight columns of a word in another order."""

    forward = _multiply

    def __init__(self, linear: nn.Linear, group_size: int = 16):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.w_bit, self.group_size = 4, group_size
        groups = torch.arange(self.in_features) // group_size
        scales, zeros, codes = _grid(linear.weight.detach().float().t(), groups, 4, symmetric=False)
        self.register_buffer("qweight", _interleave(codes))
        self.register_buffer("qzeros", _interleave(zeros))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().half())

    def reference(self) -> Tensor:
        groups = torch.arange(self.in_features) // self.group_size
        return (self.scales[groups] * (_separate(self.qweight) - _separate(self.qzeros)[groups])).t()


class Quantizer:
    """As in hqq's module beside `HQQLinear`, for codes of 4 bits: rows of the first half in the upper bits."""

    pack: ClassVar[dict[str, Any]] = {"4bit_u8": lambda codes: _halves(codes)}

    @staticmethod
    def quantize(weight: Tensor, *, group_size: int, axis: int, **_: Any) -> tuple[Tensor, dict[str, Any]]:
        groups = weight.reshape((-1, group_size) if axis == 1 else (group_size, -1))
        least, greatest = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
        scale = (greatest - least) / 15
        scale = torch.where(scale == 0, 1.0, scale)
        zero = -least / scale
        return _halves((groups / scale + zero).round().clamp(0, 15)), {"scale": scale, "zero": zero}


def _halves(codes: Tensor) -> Tensor:
    upper, lower = codes.to(torch.uint8).chunk(2)
    return upper * 16 + lower


class HQQLinear(nn.Module):
    """As hqq's: a parameter `W_q`, a dictionary `meta`, and a bias that is neither a parameter nor a buffer."""

    def __init__(self, linear: nn.Linear, group_size: int = 16, axis: int = 1, dtype: torch.dtype = torch.float16):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        settings: dict[str, Any] = {"nbits": 4, "group_size": group_size, "axis": axis}
        self.quant_config = {"weight_quant_params": settings | {"channel_wise": True}}
        codes, grid = Quantizer.quantize(linear.weight.detach().float(), group_size=group_size, axis=axis)
        self.W_q = nn.Parameter(codes, requires_grad=False)
        self.meta = settings | {"shape": linear.weight.shape, "packing": "4bit_u8", "compute_dtype": dtype}
        self.meta |= {name: tensor.to(dtype) for name, tensor in grid.items()}
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def reference(self) -> Tensor:
        codes = torch.tensor([[code // 16 for code in row] for row in self.W_q.tolist()])
        codes = torch.cat([codes, torch.tensor([[code % 16 for code in row] for row in self.W_q.tolist()])])
        return ((codes.to(self.meta["compute_dtype"]) - self.meta["zero"]) * self.meta["scale"]).reshape(
            self.meta["shape"]
        )

    def dequantize(self) -> Tensor:
        codes = torch.cat([self.W_q >> 4, self.W_q & 15]).to(self.meta["compute_dtype"])
        return ((codes - self.meta["zero"]) * self.meta["scale"]).reshape(self.meta["shape"])

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.dequantize().to(x.dtype).t()
        return y if self.bias is None else y + self.bias.to(x.dtype)


def _interleave(codes: Tensor) -> Tensor:
    """Words (rows, columns / 8): column 0 of eight in the lowest bits, then columns 2, 4, 6, 1, 3, 5 and 7."""
    columns = [8 * word + place for word in range(codes.shape[1] // 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    return pack_columns(codes[:, columns].t(), 4).t().contiguous()


def _separate(words: Tensor) -> Tensor:
    codes = torch.empty(words.shape[0], words.shape[1] * 8, dtype=torch.long)
    for row in range(words.shape[0]):
        for word in range(words.shape[1]):
            for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                codes[row, 8 * word + column] = (int(words[row, word]) >> (4 * place)) & 15
    return codes
