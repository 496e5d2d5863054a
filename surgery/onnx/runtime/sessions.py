"""Opens sessions of onnxruntime: checks their settings, and leaves out a graph pass that ends the process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from surgery.errors import SurgeryError, near_misses
from surgery.onnx.runtime.manifest import HALF, Manifest

__all__ = ["create_session", "first_line", "open_session"]


def open_session(path: Path, providers: Sequence[Any] | None, threads: int | None) -> onnxruntime.InferenceSession:
    """Opens a file. Raises `SurgeryError` for wrong settings, a missing file and errors of onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # at 2, onnxruntime warns of each slot, because it is not a constant
    if threads is not None:
        if type(threads) is not int or threads < 1:
            raise SurgeryError(f"threads={threads!r} is not a number of threads")
        options.intra_op_num_threads = threads
    available = onnxruntime.get_available_providers()
    for provider in providers or ():
        name = provider if isinstance(provider, str) else provider[0]
        if name not in available:
            why = near_misses(str(name), available) or f"this onnxruntime has {', '.join(available)}"
            raise SurgeryError(f"there is no provider {name!r}", why=why)
    if not path.is_file():
        raise SurgeryError(f"there is no file {path}")
    try:
        return create_session(path, options, providers)
    except Exception as error:
        weights_fix = "put the file of its weights beside it, under the name that it was written with"
        fix = weights_fix if "data" in str(error) else None
        raise SurgeryError(f"onnxruntime can't open {path.name}", why=first_line(error), fix=fix) from error


def create_session(path: Path, options: Any, providers: Sequence[Any] | None) -> onnxruntime.InferenceSession:
    """Creates a session. Errors are those of onnxruntime.

    onnxruntime's NchwcTransformer, which lays out float32 for convolutions, ends the process on a product of transposed
    float16 matrices (1.32: nn.MultiheadAttention). Files with float16 weights are opened without that pass.
    """
    settings: Any = {"disabled_optimizers": ["NchwcTransformer"]} if _has_half_weights(path) else {}
    return onnxruntime.InferenceSession(
        str(path), options, providers=list(providers or ["CPUExecutionProvider"]), **settings
    )


def first_line(error: Exception) -> str:
    """Returns an error's text on one line, at most 400 characters."""
    return " ".join(str(error).split())[:400]


def _has_half_weights(path: Path) -> bool:
    try:
        return Manifest.read(path).further.get(HALF) is True
    except SurgeryError:  # the caller reads the manifest again and raises the error
        return False
