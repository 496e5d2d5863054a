"""Varies the values in a call's tensors: a file that is right for the example's values may be wrong for others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.onnx.calls.example import ExampleCall

__all__ = ["VariedCall", "other_values"]

_LARGE = 1e3
_CACHED = ("past_key_values", "encoder_outputs")  # computed by a model, so not varied


@dataclass(frozen=True)
class VariedCall:
    """A call with other values than the example. `edge`: an edge case, in which file and model may differ."""

    description: str
    call: ExampleCall
    edge: bool


def other_values(example: ExampleCall) -> list[VariedCall]:
    """Returns the example with padded texts, and edge cases: masks with an empty row, texts of one repeated token,
    zeros, large numbers. Variations that change no tensor are left out."""
    calls = []
    for description, change, edge in _VARIATIONS:
        changed: list[bool] = []

        def vary(name: str, tensor: Tensor, change: Change = change, changed: list[bool] = changed) -> Tensor:
            new = change(name, tensor) if tensor.numel() and not name.startswith(_CACHED) else None
            changed.append(new is not None and not torch.equal(new, tensor))
            return tensor if new is None else new

        call = example.mapped(vary)
        if any(changed):
            calls.append(VariedCall(description, call, edge))
    return calls


Change = Callable[[str, Tensor], "Tensor | None"]


def _padded(name: str, tensor: Tensor) -> Tensor | None:
    """Pads the first text on its left, the others on their right."""
    if not _is_padding(name, tensor) or tensor.shape[1] < 3:
        return None
    length = max(1, tensor.shape[1] // 3)
    changed = tensor.clone()
    changed[0, :length] = 0
    changed[1:, -length:] = 0
    return changed


def _empty(name: str, tensor: Tensor) -> Tensor | None:
    """Closes all positions in the first row of a mask, and opens all in the second."""
    if not _is_mask(name, tensor):
        return None
    changed = tensor.clone()
    rows = changed.view(-1, changed.shape[-1])
    closed = _closed_value(tensor) if tensor.is_floating_point() else 0
    rows[0] = closed
    if len(rows) > 1:
        rows[1] = 0.0 if tensor.is_floating_point() else 1
    return changed


def _repeated(name: str, tensor: Tensor) -> Tensor | None:
    if tensor.is_floating_point() or tensor.is_complex() or _is_mask(name, tensor) or not tensor.dim():
        return None
    return tensor[..., :1].expand_as(tensor).contiguous()


def _zeros(name: str, tensor: Tensor) -> Tensor | None:
    return torch.zeros_like(tensor) if _is_number(name, tensor) else None


def _large(name: str, tensor: Tensor) -> Tensor | None:
    return tensor * _LARGE if _is_number(name, tensor) else None


_VARIATIONS: list[tuple[str, Change, bool]] = [
    ("padded texts", _padded, False),
    ("masks with an empty row", _empty, True),
    ("repeated tokens", _repeated, True),
    ("zeros", _zeros, True),
    ("large numbers", _large, True),
]


def _is_padding(name: str, tensor: Tensor) -> bool:
    """Whether the tensor is a padding mask: a row for each text, 1 for each token."""
    return "mask" in name and tensor.dim() == 2 and not tensor.is_floating_point() and _is_mask(name, tensor)


def _is_mask(name: str, tensor: Tensor) -> bool:
    if not tensor.dim() or tensor.is_complex():
        return False
    if tensor.is_floating_point():
        return ("mask" in name or bool(tensor.isinf().any())) and not bool((tensor > 0).any())
    return tensor.dtype == torch.bool or ("mask" in name and bool(((tensor == 0) | (tensor == 1)).all()))


def _is_number(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not _is_mask(name, tensor)


def _closed_value(tensor: Tensor) -> float:
    """Returns the value of closed positions in a float mask."""
    lowest = float(tensor.min())
    return lowest if lowest < -1e3 else float("-inf")
