"""Traces LSTM, GRU and RNN as one operation, and translates it to the operators of ONNX.

Traced directly, they are unrolled to the example's number of steps, so the file would accept only that length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp.decompositions import lstm_impl

__all__ = ["recurrent_layers", "translations"]

_OPERATOR = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
_TORCH_FUNCTIONS: dict[str, Callable[..., Any]] = {kind: getattr(torch, kind) for kind in _OPERATOR}
_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}  # for each of ONNX's gates, its index in torch's weights


@torch.library.custom_op("surgery::recurrent", mutates_args=())
def recurrent(
    x: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], kind: str, biases: bool, layers: int,
    bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the outputs, the last hidden state, and the last cell state, which is empty except for LSTM."""
    states = list(hx) if kind == "lstm" else hx[0]
    out, *last = _TORCH_FUNCTIONS[kind](x, states, list(params), biases, layers, 0.0, False, bidirectional, batch_first)
    return out, last[0], last[1] if kind == "lstm" else x.new_empty(0)


@recurrent.register_fake
def _(
    x: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], kind: str, biases: bool, layers: int,
    bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out = x.new_empty((*x.shape[:2], hx[0].shape[2] * (2 if bidirectional else 1)))
    cell = torch.empty_like(hx[1]) if kind == "lstm" else x.new_empty(0)
    return out, torch.empty_like(hx[0]), cell


@contextlib.contextmanager
def recurrent_layers() -> Iterator[None]:
    """Replaces torch's functions by `recurrent` during the block."""
    namespaces: list[Any] = [torch, torch._VF]  # torch.nn calls the latter
    try:
        for namespace in namespaces:
            for kind, function in _TORCH_FUNCTIONS.items():
                setattr(namespace, kind, _replacement(kind, function))
        yield
    finally:
        for kind, function in _TORCH_FUNCTIONS.items():
            setattr(torch, kind, function)
            torch._VF.__dict__.pop(kind, None)  # torch._VF then finds torch's function again


def _replacement(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _has_operator(args, kwargs):
            # onnxscript (0.7.2) ignores a projection, so the layer is unrolled.
            return (lstm_impl if _has_projection(args) else function)(*args, **kwargs)
        x, hx, params, biases, layers, _, _, bidirectional, batch_first = args
        states = list(hx) if kind == "lstm" else [hx]
        out = torch.ops.surgery.recurrent(x, states, list(params), kind, biases, layers, bidirectional, batch_first)
        return out if kind == "lstm" else out[:2]

    return call


def _has_operator(args: Any, kwargs: Any) -> bool:
    """Whether ONNX has an operator: no packed sequence, no dropout between layers, no projection."""
    if kwargs or len(args) != 9 or not isinstance(args[3], bool) or not isinstance(args[0], Tensor):
        return False
    return not _has_projection(args) and not (args[6] and args[5])


def _has_projection(args: Any) -> bool:
    states = args[1] if len(args) > 1 else None
    return isinstance(states, (tuple, list)) and len(states) == 2 and states[0].shape[2] != states[1].shape[2]


def translations() -> dict[Any, Any]:
    """Returns the translation for `torch.onnx.export`."""
    return {torch.ops.surgery.recurrent.default: _translate}


def _translate(
    x: Any, hx: Sequence[Any], params: Sequence[Any], kind: str, biases: bool, layers: int, bidirectional: bool,
    batch_first: bool,
) -> Any:  # fmt: skip
    from onnxscript import opset18

    op: Any = opset18
    directions, each = 2 if bidirectional else 1, 4 if biases else 2
    attributes: dict[str, Any] = {"hidden_size": int(params[1].shape[1])}
    attributes["direction"] = "bidirectional" if bidirectional else "forward"
    if kind == "gru":
        attributes["linear_before_reset"] = 1
    if kind == "rnn_relu":
        attributes["activations"] = ["Relu"] * directions
    current = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
    last: list[list[Any]] = []
    for layer in range(layers):
        start = layer * directions
        groups = [
            params[(start + direction) * each : (start + direction + 1) * each] for direction in range(directions)
        ]
        weights = [_stack_directions(op, [_in_order(op, group[index], kind) for group in groups]) for index in (0, 1)]
        if biases:
            bias_pairs = [op.Concat(_in_order(op, g[2], kind), _in_order(op, g[3], kind), axis=0) for g in groups]
            weights.append(_stack_directions(op, bias_pairs))
        states = [op.Slice(state, [start], [start + directions], [0]) if layers > 1 else state for state in hx]
        inputs = [current, *weights, *([None] if not biases else []), None, *states]
        out, *ends = getattr(op, _OPERATOR[kind])(*inputs, **attributes)
        last.append(ends)
        if bidirectional:  # (positions, directions, batch, size) → (positions, batch, both)
            current = op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
        else:
            current = op.Squeeze(out, [1])
    out = op.Transpose(current, perm=[1, 0, 2]) if batch_first else current
    ends = [values[0] if layers == 1 else op.Concat(*values, axis=0) for values in zip(*last, strict=True)]
    return out, ends[0], ends[1] if kind == "lstm" else op.Identity(ends[0])


def _in_order(op: Any, weight: Any, kind: str) -> Any:
    """Returns a weight with its gates in ONNX's order."""
    order = _GATES.get(kind)
    if order is None:
        return weight
    parts = op.Split(weight, axis=0, num_outputs=len(order))
    return op.Concat(*(parts[place] for place in order), axis=0)


def _stack_directions(op: Any, weights: Sequence[Any]) -> Any:
    """Stacks the weights of the directions in one tensor."""
    wide = [op.Unsqueeze(weight, [0]) for weight in weights]
    return wide[0] if len(wide) == 1 else op.Concat(*wide, axis=0)
