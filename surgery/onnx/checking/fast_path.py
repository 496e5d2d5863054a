"""torch's own kernel for attention in evaluation, which parts from its other path where a mask lets nothing through."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from surgery.arithmetic.float64_reference import difference
from surgery.onnx.checking.output_differences import Call, expected_of

__all__ = ["told_apart"]

_LIMIT = 1e-3  # of the largest number: far more than another order of sums brings


def told_apart(model: nn.Module, calls: Iterable[Call]) -> list[str]:
    """A notice for each kind of values at which `nn.MultiheadAttention` gives other numbers by that kernel than by the
    path that training takes, which is the file's and what it is compared with."""
    if not any(isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) for module in model.modules()):
        return []
    notices = []
    for call in calls:
        ours, theirs = (_by_path(model, call, fast) for fast in (False, True))
        if ours is None or theirs is None:
            continue
        apart = [
            difference(ours_there, other)
            for ours_there, other in zip(ours, theirs, strict=True)
            if ours_there.shape == other.shape
        ]
        if any(distance > _LIMIT for distance in apart):
            what = "torch's own kernel for evaluation gives other numbers than the path that training takes"
            notices.append(f"with {call.values} {what}, which the file has")
    return notices


def _by_path(model: nn.Module, call: Call, fast: bool) -> list[torch.Tensor] | None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        return expected_of(model, call.given)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
