"""Translates attention so that the file computes what torch computes, for every mask and opset.

torch's own translation is wrong if a row of a mask is empty: torch returns zeros, and the file NaN or the mean of all
values. It also refuses negative scales and tensors without four dimensions. From opset 23 on, it refuses masks with one
column, and heads or batches that are broadcast.
"""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["REPLACED", "translations"]

OPERATION = 23  # from this opset on, ONNX has an Attention operator
REPLACED = "torch.nn.functional.scaled_dot_product_attention"  # transformers' patch, which this translation replaces


def translations(opset: int) -> dict[Any, Any]:
    """Returns the translation for `torch.onnx.export`."""

    def translate(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        if opset >= OPERATION and _has_operator(query, key, value, attn_mask, scale):
            from onnxscript import opset23

            op: Any = opset23
            return op.Attention(query, key, value, attn_mask, scale=scale, is_causal=int(is_causal))[0]
        if enable_gqa:
            key, value = _repeat_heads(key, query), _repeat_heads(value, query)
        return _products(query, key, value, attn_mask, is_causal, scale)

    return {torch.ops.aten.scaled_dot_product_attention.default: translate}


def _has_operator(query: Any, key: Any, value: Any, mask: Any, scale: float | None) -> bool:
    """Whether ONNX's operator computes the same as torch.

    onnxruntime's kernel broadcasts only a mask's rows, and treats the lowest number of a float mask as masked.
    """
    if any(tensor.shape is None or len(tensor.shape) != 4 for tensor in (query, key, value)) or (scale or 1.0) < 0:
        return False
    heads, shared = query.shape[1], key.shape[1]
    grouped = isinstance(heads, int) and isinstance(shared, int) and heads % shared == 0
    same_sizes = all(_equal(key.shape[axis], value.shape[axis]) for axis in range(3))
    if not (grouped and same_sizes and _equal(query.shape[0], key.shape[0])):
        return False
    return mask is None or (_is_bool(mask) and mask.shape is not None and _equal(mask.shape[-1], key.shape[2]))


def _equal(first: Any, other: Any) -> bool:
    """Whether two sizes are known to be equal; each is a number or a symbol."""
    if isinstance(first, int) or isinstance(other, int):
        return first == other
    return first.value is not None and first.value == other.value


def _is_bool(mask: Any) -> bool:
    import onnx_ir as ir

    return mask.dtype == ir.DataType.BOOL


def _products(query: Any, key: Any, value: Any, mask: Any, is_causal: bool, scale: float | None) -> Any:
    """softmax(query · keyᵀ · scale + mask) · value, and zeros where a row of the mask is empty."""
    import onnx_ir as ir
    from onnxscript import opset18

    op: Any = opset18
    kind, rank = query.dtype, len(query.shape)

    def constant(number: float) -> Any:
        return op.Constant(value=ir.tensor(number, dtype=kind))

    transposed = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = op.MatMul(op.Mul(query, _scale(query, scale)), transposed)
    row_is_open = None
    if is_causal:  # every row sees the first key
        scores = op.Where(_causal(scores), scores, constant(kind.min))
    elif mask is not None:
        last = op.Constant(value_ints=[-1])
        if _is_bool(mask):
            row_is_open = op.Cast(op.ReduceMax(op.Cast(mask, to=ir.DataType.INT32), last), to=ir.DataType.BOOL)
            mask = op.Where(mask, constant(0.0), constant(kind.min))
        else:
            row_is_open = op.Greater(op.ReduceMax(mask, last), op.CastLike(constant(-math.inf), mask))
        scores = op.Add(scores, mask)
    context = op.MatMul(op.Softmax(scores, axis=-1), value)
    return context if row_is_open is None else op.Where(row_is_open, context, constant(0.0))


def _scale(query: Any, scale: float | None) -> Any:
    import onnx_ir as ir
    from onnxscript import opset18

    op: Any = opset18
    size = query.shape[-1]
    if scale is None and not isinstance(size, int):
        length = op.Cast(op.Shape(query, start=-1), to=query.dtype)
        return op.Reciprocal(op.Sqrt(length))
    return op.Constant(value=ir.tensor(1 / math.sqrt(size) if scale is None else scale, dtype=query.dtype))


def _causal(scores: Any) -> Any:
    import onnx_ir as ir
    from onnxscript import opset18

    op: Any = opset18
    sizes = op.Shape(scores, start=-2)
    ones = op.Expand(op.Constant(value=ir.tensor([1], dtype=ir.DataType.INT64)), sizes)
    return op.Cast(op.Trilu(ones, upper=0), to=ir.DataType.BOOL)


def _repeat_heads(tensor: Any, query: Any) -> Any:
    """Repeats the heads of keys or values that several query heads share."""
    from onnxscript import opset18

    op: Any = opset18
    axis = len(tensor.shape) - 3
    heads, times = query.shape[-3], query.shape[-3] // tensor.shape[-3]
    if times == 1:
        return tensor
    wide = op.Unsqueeze(tensor, op.Constant(value_ints=[axis + 1]))
    wide = op.Expand(wide, op.Constant(value_ints=[1] * (axis + 1) + [times, 1, 1]))
    sizes = [op.Constant(value_ints=[heads]), op.Shape(tensor, start=axis + 1)]
    return op.Reshape(wide, op.Concat(*([op.Shape(tensor, end=axis)] if axis else []), *sizes, axis=0))
