"""The base's own embeddings in PEFT's checkpoints: the file has them, and a converted adapter must have no others."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

import numpy as np

from surgery.errors import SurgeryError, SurgeryWarning
from surgery.onnx.runtime.dtypes import widened

if TYPE_CHECKING:
    from surgery.onnx.conversion.conversion_state import Conversion

__all__ = ["base"]

_KEY = re.compile(r"(.+?)(?:\.token_adapter)?(?:\.base_layer)+\.(weight|bias)")


def base(conversion: Conversion) -> None:
    """Take out what is the exported base's, too. Other numbers are a problem: no slot holds them."""
    for key in list(conversion.left):
        hit = _KEY.fullmatch(key)
        if hit is None:
            continue
        name, values = f"{hit[1]}.{hit[2]}", np.asarray(widened(conversion.left[key]), np.float64)
        with conversion.noting(key):
            same = _same(conversion, name, values)
            if same is None:
                why = f"whether {key} is the exported base's can't be told; it is passed over"
                warnings.warn(why, SurgeryWarning, stacklevel=4)
            elif not same:
                why = "the vocabulary was resized, or its embeddings were trained, before the adapter was"
                fix = "load_adapter and export_adapter, with the model"
                raise SurgeryError("the checkpoint has other embeddings than the exported base", why=why, fix=fix)
        conversion.left.pop(key, None)


def _same(conversion: Conversion, name: str, values: np.ndarray) -> bool | None:
    """Whether the exported file has these numbers, under the module's name or that of one it is tied to."""
    try:
        weights = conversion.weights
    except SurgeryError:  # the package that reads them is not here
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
    """Within the rounding of half precision, in which either may have been kept."""
    return stored.shape == values.shape and bool(np.allclose(stored, values, rtol=2.0**-7, atol=1e-6))
