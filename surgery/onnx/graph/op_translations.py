"""Collects translations of operations that torch's exporter lacks or writes wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from surgery.onnx.graph import attention, low_rank_op, operators, recurrent

__all__ = ["OPSET", "replaced_patches", "translations"]

OPSET = 20  # the default of torch.onnx.export


def translations(how: Any) -> dict[Any, Any]:
    """Returns the table for `torch.onnx.export`. `how`: the `ExportSettings`."""
    table = {**low_rank_op.translations(), **recurrent.translations(), **operators.translations()}
    table[torch.ops.aten.conv3d.default] = _conv3d()
    return {**table, **attention.translations(how.opset or OPSET)} if replaced_patches(how) else table


def replaced_patches(how: Any) -> list[str]:
    """Returns transformers' patches that a translation replaces. onnxruntime's fusions need the patches' form."""
    return [] if how.optimize_for == "ort" else [attention.REPLACED]


def _conv3d() -> Any:
    """Returns a translation of Conv3d: without a bias, onnxscript (0.7.2) adds one of a wrong shape."""
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
