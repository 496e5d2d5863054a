"""A linear layer with low-rank branches as one operation while a model is exported: traced once, written as products.

Traced as it is written, a branch is some ten operations on sizes that are symbols, each looked at several times; for
a branch on each linear layer that was more than half of what an export took.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery import lowering

__all__ = ["as_one_operation", "translations"]


@torch.library.custom_op("surgery::low_rank_linear", mutates_args=())
def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[Tensor], scales: Sequence[float]
) -> Tensor:
    y = F.linear(x, weight, bias)
    for A, B, scale in zip(factors[::2], factors[1::2], scales, strict=True):
        y = lowering.same_dtype(y + F.linear(F.linear(x.to(A.dtype), A), B) * scale, y)
    return y


@low_rank_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    torch._check(x.shape[-1] == weight.shape[1])  # else that would be a free size of the file
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@contextlib.contextmanager
def as_one_operation() -> Iterator[None]:
    """Forwards that are traced inside of the block call it so."""
    with lowering.layers_by(low_rank_linear):
        yield


def translations() -> dict[Any, Any]:
    """How it is written in ONNX, for `torch.onnx.export`."""
    from onnxscript import opset18
    from onnxscript.function_libs.torch_lib.ops.nn import aten_linear

    op: Any = opset18

    def written(x: Any, weight: Any, bias: Any, factors: Sequence[Any], scales: Sequence[float]) -> Any:
        y = aten_linear(x, weight, bias)
        for A, B, scale in zip(factors[::2], factors[1::2], scales, strict=True):
            given = x if A.dtype == x.dtype else op.CastLike(x, A)
            branch = op.MatMul(op.MatMul(given, op.Transpose(A, perm=[1, 0])), op.Transpose(B, perm=[1, 0]))
            branch = branch if scale == 1.0 else op.Mul(branch, op.CastLike(scale, branch))
            y = op.Add(y, branch) if A.dtype == y.dtype else op.CastLike(op.Add(op.CastLike(y, A), branch), y)
        return y

    return {torch.ops.surgery.low_rank_linear.default: written}
