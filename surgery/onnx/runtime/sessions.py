"""Sessions of onnxruntime, without what it can't do to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from surgery.errors import SurgeryError
from surgery.onnx.runtime.manifest import HALF, Manifest

__all__ = ["session"]


def session(path: Path, options: Any, providers: Sequence[Any] | None) -> onnxruntime.InferenceSession:
    """A session; onnxruntime's own errors.

    Its NchwcTransformer, which lays out float32 for convolutions, ends the process on a product of turned float16
    matrices (1.32: nn.MultiheadAttention), so files with float16 weights are opened without.
    """
    left_out: Any = {"disabled_optimizers": ["NchwcTransformer"]} if _half(path) else {}
    return onnxruntime.InferenceSession(
        str(path), options, providers=list(providers or ["CPUExecutionProvider"]), **left_out
    )


def _half(path: Path) -> bool:
    try:
        return Manifest.read(path).further.get(HALF) is True
    except SurgeryError:  # whoever opens it tells why
        return False
