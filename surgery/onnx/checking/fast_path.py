"""Finds calls in which torch's fast kernel for attention differs from the path that training takes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from surgery.arithmetic.float64_reference import difference
from surgery.onnx.checking.output_differences import Call, expected_of

__all__ = ["fast_path_notices"]

_LIMIT = 1e-3  # relative to the largest number; far above the effect of another summation order


def fast_path_notices(model: nn.Module, calls: Iterable[Call]) -> list[str]:
    """Returns a notice for each call in which the two paths of `nn.MultiheadAttention` differ.

    The file computes the path that training takes, and is compared with it.
    """
    if not any(isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) for module in model.modules()):
        return []
    notices = []
    for call in calls:
        slow, fast = (_outputs(model, call, enabled) for enabled in (False, True))
        if slow is None or fast is None:
            continue
        distances = [
            difference(output, other) for output, other in zip(slow, fast, strict=True) if output.shape == other.shape
        ]
        if any(distance > _LIMIT for distance in distances):
            what = "torch's fast kernel for evaluation gives other numbers than the path that training takes"
            notices.append(f"with {call.values} {what}, which the file has")
    return notices


def _outputs(model: nn.Module, call: Call, fast_path: bool) -> list[torch.Tensor] | None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        return expected_of(model, call.example)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
