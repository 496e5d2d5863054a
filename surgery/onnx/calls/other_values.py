"""One call with other values in its tensors: what holds for the example's may not hold for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.onnx.calls.example import ExampleCall

__all__ = ["Varied", "other_values"]

_LARGE = 1e3
_CACHED = ("past_key_values", "encoder_outputs")  # which hold what a model has computed


@dataclass(frozen=True)
class Varied:
    """A call, and what is other than in the example; `edge`: a case in which files and models may part."""

    description: str
    call: ExampleCall
    edge: bool


def other_values(example: ExampleCall) -> list[Varied]:
    """The example with padded texts; and at the edges: masks with a row that lets nothing through and one that lets
    everything, texts of one token, zeros, numbers a thousand times as large. What changes nothing is left out."""
    calls = []
    for description, change, edge in _WAYS:
        changed: list[bool] = []

        def varied(name: str, tensor: Tensor, change: Change = change, changed: list[bool] = changed) -> Tensor:
            other = change(name, tensor) if tensor.numel() and not name.startswith(_CACHED) else None
            changed.append(other is not None and not torch.equal(other, tensor))
            return tensor if other is None else other

        call = example.mapped(varied)
        if any(changed):
            calls.append(Varied(description, call, edge))
    return calls


Change = Callable[[str, Tensor], "Tensor | None"]


def _padded(name: str, tensor: Tensor) -> Tensor | None:
    """The first text has padding on its left, the others on their right."""
    if not _is_padding(name, tensor) or tensor.shape[1] < 3:
        return None
    length = max(1, tensor.shape[1] // 3)
    changed = tensor.clone()
    changed[0, :length] = 0
    changed[1:, -length:] = 0
    return changed


def _empty(name: str, tensor: Tensor) -> Tensor | None:
    """The first row of a mask lets nothing through, the second everything."""
    if not _is_mask(name, tensor):
        return None
    changed = tensor.clone()
    rows = changed.view(-1, changed.shape[-1])
    closed = _closed(tensor) if tensor.is_floating_point() else 0
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


_WAYS: list[tuple[str, Change, bool]] = [
    ("padded texts", _padded, False),
    ("masks with an empty row", _empty, True),
    ("repeated tokens", _repeated, True),
    ("zeros", _zeros, True),
    ("large numbers", _large, True),
]


def _is_padding(name: str, tensor: Tensor) -> bool:
    """A mask of texts' tokens: a row for each, 1 where there is one."""
    return "mask" in name and tensor.dim() == 2 and not tensor.is_floating_point() and _is_mask(name, tensor)


def _is_mask(name: str, tensor: Tensor) -> bool:
    if not tensor.dim() or tensor.is_complex():
        return False
    if tensor.is_floating_point():
        return ("mask" in name or bool(tensor.isinf().any())) and not bool((tensor > 0).any())
    return tensor.dtype == torch.bool or ("mask" in name and bool(((tensor == 0) | (tensor == 1)).all()))


def _is_number(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not _is_mask(name, tensor)


def _closed(tensor: Tensor) -> float:
    """What a float mask has where it lets nothing through."""
    lowest = float(tensor.min())
    return lowest if lowest < -1e3 else float("-inf")
