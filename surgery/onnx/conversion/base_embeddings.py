"""Compares the base's embeddings in a PEFT checkpoint with those of the exported file."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

import numpy as np

from surgery.errors import SurgeryError, SurgeryWarning
from surgery.onnx.runtime.dtypes import widened

if TYPE_CHECKING:
    from surgery.onnx.conversion.conversion_state import Conversion

__all__ = ["drop_base_embeddings"]

_KEY = re.compile(r"(.+?)(?:\.token_adapter)?(?:\.base_layer)+\.(weight|bias)")


def drop_base_embeddings(conversion: Conversion) -> None:
    """Drops embeddings that equal the file's. Different ones are a problem, because no slot takes them."""
    for key in list(conversion.remaining_tensors):
        hit = _KEY.fullmatch(key)
        if hit is None:
            continue
        name, values = f"{hit[1]}.{hit[2]}", np.asarray(widened(conversion.remaining_tensors[key]), np.float64)
        with conversion.collecting_errors(key):
            same = _equals_base(conversion, name, values)
            if same is None:
                notice = f"{key} can't be compared with the exported base, so it is ignored"
                warnings.warn(notice, SurgeryWarning, stacklevel=4)
            elif not same:
                why = "the vocabulary was resized, or its embeddings were trained, before the adapter was"
                fix = "load_adapter and export_adapter, with the model"
                raise SurgeryError("the checkpoint has other embeddings than the exported base", why=why, fix=fix)
        conversion.remaining_tensors.pop(key, None)


def _equals_base(conversion: Conversion, name: str, values: np.ndarray) -> bool | None:
    """Whether the file has these values under this name or a tied weight's name. None if they can't be compared."""
    try:
        weights = conversion.weights
    except SurgeryError:  # the onnx package, which reads the weights, is missing
        return None
    if name in weights.initializers:
        return _near(weights[name], values)
    for other in weights.initializers:
        if sorted(weights.initializers[other].dims) == sorted(values.shape):
            stored = weights.stored(other)
            if stored.dtype.kind == "f" and any(
                _near(candidate.astype(np.float64), values) for candidate in (stored, stored.T)
            ):
                return True
    return None


def _near(stored: np.ndarray, values: np.ndarray) -> bool:
    """Compares up to the rounding of half precision: either side may have been stored in it."""
    return stored.shape == values.shape and bool(np.allclose(stored, values, rtol=2.0**-7, atol=1e-6))
