"""How operations are written in ONNX where torch's exporter has no way of its own, or a wrong one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from surgery.onnx.graph import attention, low_rank_op, operators, recurrent

__all__ = ["OPSET", "replaced", "translations"]

OPSET = 20  # what torch.onnx.export writes unless it is told


def translations(how: Any) -> dict[Any, Any]:
    """For `torch.onnx.export`. `how`: the export's `Settings`."""
    table = {**low_rank_op.translations(), **recurrent.translations(), **operators.translations()}
    table[torch.ops.aten.conv3d.default] = _conv3d()
    return {**table, **attention.translations(how.opset or OPSET)} if replaced(how) else table


def replaced(how: Any) -> list[str]:
    """transformers' patches in whose place there is a translation. onnxruntime's fusions look for theirs."""
    return [] if how.optimize_for == "ort" else [attention.REPLACED]


def _conv3d() -> Any:
    """A Conv3d, which onnxscript (0.7.2) gives a bias of a wrong shape where it has none."""
    from onnxscript import opset18

    op: Any = opset18
    ones, zeros = (1, 1, 1), (0, 0, 0)

    def translate(
        input: Any, weight: Any, bias: Any = None, stride: Sequence[int] = ones, padding: Sequence[int] = zeros,
        dilation: Sequence[int] = ones, groups: int = 1,
    ) -> Any:  # fmt: skip
        strides, pads, dilations = ([*each, *each, *each][:3] for each in (stride, padding, dilation))
        inputs = (input, weight) if bias is None else (input, weight, bias)
        return op.Conv(*inputs, strides=strides, pads=[*pads, *pads], dilations=dilations, group=groups)

    return translate
