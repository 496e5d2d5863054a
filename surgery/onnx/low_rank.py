"""The low-rank branch as one operation of its own while a model is exported: traced once, and written as two products.

Traced as it is written, a branch is some ten operations on sizes that are symbols, each looked at several times; for
a branch on each linear layer that was more than half of what an export took.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery import lowering

__all__ = ["as_one_operation", "translations"]


@torch.library.custom_op("surgery::low_rank", mutates_args=())
def low_rank(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return F.linear(F.linear(x, A), B)


@low_rank.register_fake
def _(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], B.shape[0]))


@contextlib.contextmanager
def as_one_operation() -> Iterator[None]:
    """Forwards that are traced inside of the block call it so."""
    with lowering.branches_by(low_rank):
        yield


def translations() -> dict[Any, Any]:
    """How it is written in ONNX, for `torch.onnx.export`."""
    from onnxscript import opset18

    op: Any = opset18

    def written(x: Any, A: Any, B: Any) -> Any:
        down = op.MatMul(x, op.Transpose(A, perm=[1, 0]))
        return op.MatMul(down, op.Transpose(B, perm=[1, 0]))

    return {torch.ops.surgery.low_rank.default: written}
