"""Translates operations for which torch's exporter is wrong at some values: large, zero, negative, integer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["translations"]


def translations() -> dict[Any, Any]:
    """Returns the table for `torch.onnx.export`."""
    aten = torch.ops.aten
    return {
        aten.log_sigmoid.default: _log_sigmoid,
        aten.logaddexp.default: _logaddexp,
        aten.atan2.default: _atan2,
        aten.div.Tensor_mode: _div,
        aten.div.Scalar_mode: _div,
        aten.floor_divide.default: _floor_divide,
        aten.floor_divide.Scalar: _floor_divide,
        aten.remainder.Tensor: _remainder,
        aten.remainder.Scalar: _remainder,
        aten.avg_pool2d.default: _avg_pool(2),
        aten.avg_pool3d.default: _avg_pool(3),
    }


def _op() -> Any:
    from onnxscript import opset18

    return opset18


def _constant(number: float, like: Any) -> Any:
    import onnx_ir as ir

    return _op().Constant(value=ir.tensor(number, dtype=like.dtype))


def _log1p_exp(x: Any, like: Any) -> Any:
    """log(1 + exp(x)) for x ≤ 0. onnxruntime's Softplus does not support float64."""
    import onnx_ir as ir

    op = _op()
    return op.Log(op.Add(op.Exp(x), _constant(1.0, like))) if like.dtype == ir.DataType.DOUBLE else op.Softplus(x)


def _log_sigmoid(x: Any) -> Any:
    """log(sigmoid(x)). The direct form is -inf below -88."""
    op = _op()
    return op.Sub(op.Min(x, _constant(0.0, x)), _log1p_exp(op.Neg(op.Abs(x)), x))


def _logaddexp(first: Any, other: Any) -> Any:
    """log(exp(x) + exp(y)). The direct form is inf above 88."""
    op = _op()
    distance = op.Where(op.Equal(first, other), _constant(0.0, first), op.Abs(op.Sub(first, other)))  # inf - inf
    return op.Add(op.Max(first, other), _log1p_exp(op.Neg(distance), first))


def _atan2(y: Any, x: Any) -> Any:
    """atan2 with separate cases for the axes, where y / x does not determine the angle."""
    op = _op()
    zero, quarter, half = (_constant(number, y) for number in (0.0, math.pi / 2, math.pi))
    below = op.Less(y, zero)
    angle = op.Atan(op.Div(y, x))
    left = op.Add(angle, op.Where(below, op.Neg(half), half))
    upright = op.Where(op.Equal(y, zero), zero, op.Where(below, op.Neg(quarter), quarter))
    return op.Where(op.Less(x, zero), left, op.Where(op.Equal(x, zero), upright, angle))


def _div(first: Any, other: Any, rounding_mode: str | None = None) -> Any:
    """Divides integers without a conversion to float32, which keeps only 24 bits."""
    first, other = _pair(first, other)
    op = _op()
    if rounding_mode == "floor":
        return _floor_divide(first, other)
    if first.dtype.is_integer():  # ONNX divides integers towards zero
        return op.Div(first, other)
    quotient = op.Div(first, other)
    return op.Mul(op.Sign(quotient), op.Floor(op.Abs(quotient))) if rounding_mode == "trunc" else quotient


def _floor_divide(first: Any, other: Any) -> Any:
    """Floor division as in Python: 1 // 0.1 is 9."""
    first, other = _pair(first, other)
    op = _op()
    zero = _constant(0, first)
    if first.dtype.is_integer():
        if not first.dtype.is_signed():
            return op.Div(first, other)
        rest = op.Sub(first, op.Mul(op.Div(first, other), other))
        under = op.And(op.Not(op.Equal(rest, zero)), op.Not(op.Equal(op.Less(rest, zero), op.Less(other, zero))))
        return op.Sub(op.Div(first, other), op.Cast(under, to=first.dtype))
    rest = op.Mod(first, other, fmod=1)
    under = op.And(op.Not(op.Equal(rest, zero)), op.Not(op.Equal(op.Less(rest, zero), op.Less(other, zero))))
    whole = op.Sub(op.Div(op.Sub(first, rest), other), op.Cast(under, to=first.dtype))
    lower = op.Floor(whole)
    rounded = op.Add(lower, op.Cast(op.Greater(op.Sub(whole, lower), _constant(0.5, first)), to=first.dtype))
    return op.Where(op.Equal(other, zero), op.Div(first, other), rounded)


def _remainder(first: Any, other: Any) -> Any:
    """The remainder with the divisor's sign."""
    first, other = _pair(first, other)
    op = _op()
    if first.dtype.is_integer():
        return op.Mod(first, other)
    zero, rest = _constant(0.0, first), op.Mod(first, other, fmod=1)
    signs_differ = op.And(op.Not(op.Equal(rest, zero)), op.Not(op.Equal(op.Less(rest, zero), op.Less(other, zero))))
    return op.Where(signs_differ, op.Add(rest, other), rest)


def _pair(first: Any, other: Any) -> tuple[Any, Any]:
    """Returns two tensors of the same dtype. A float number converts an integer tensor to float32."""
    import onnx_ir as ir

    if isinstance(other, float) and first.dtype.is_integer():
        first = _op().Cast(first, to=ir.DataType.FLOAT)
    return first, _constant(other, first) if isinstance(other, (int, float)) else other


def _avg_pool(rank: int) -> Any:
    """Returns a translation of average pooling that supports `divisor_override`."""

    def translate(
        x: Any, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
        ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Any:  # fmt: skip
        from onnxscript.function_libs.torch_lib.ops import nn

        torch_translation = nn.aten_avg_pool2d if rank == 2 else nn.aten_avg_pool3d
        if divisor_override is None:
            return torch_translation(x, kernel_size, stride, padding, ceil_mode, count_include_pad)
        window = math.prod([*kernel_size, *kernel_size, *kernel_size][:rank] if len(kernel_size) == 1 else kernel_size)
        average = torch_translation(x, kernel_size, stride, padding, ceil_mode, True)
        return _op().Mul(average, _constant(window / divisor_override, x))

    return translate
