"""Converts the names of dtypes between manifests, numpy and onnxruntime, and arrays to OrtValues."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np

from surgery.errors import SurgeryError

__all__ = ["NAMES", "array_of_value", "dtype_of", "name_of", "describe_dtype", "value_of", "widened"]

BF16 = 16  # ONNX's number of bfloat16, which numpy does not have
NAMES = {
    "float32": "tensor(float)", "float64": "tensor(double)", "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)", "int64": "tensor(int64)", "int32": "tensor(int32)", "int16": "tensor(int16)",
    "int8": "tensor(int8)", "uint64": "tensor(uint64)", "uint32": "tensor(uint32)", "uint16": "tensor(uint16)",
    "uint8": "tensor(uint8)", "bool": "tensor(bool)",
}  # fmt: skip
_BY_RUNTIME = {runtime_name: name for name, runtime_name in NAMES.items()}


def dtype_of(name: str) -> np.dtype:
    """Returns the numpy dtype of a name. bfloat16 needs ml_dtypes."""
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            fix = "pip install ml_dtypes"
            raise SurgeryError("bfloat16 needs ml_dtypes", why="numpy does not have it", fix=fix) from None
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@lru_cache
def describe_dtype(dtype: np.dtype) -> str:
    """Returns a dtype's name, cached: numpy builds the text at each access."""
    return dtype.name


def name_of(runtime: str) -> str | None:
    """Returns the name of onnxruntime's type, such as `tensor(float)`; None for other types than tensors of numbers."""
    return _BY_RUNTIME.get(runtime)


def value_of(array: np.ndarray) -> Any:
    """Returns an OrtValue that shares an array's memory and keeps it alive."""
    import onnxruntime

    array = np.ascontiguousarray(array) if array.ndim else array
    if describe_dtype(array.dtype) == "bfloat16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BF16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def array_of_value(value: Any) -> np.ndarray:
    """Returns a copy of an OrtValue's numbers."""
    if value.data_type() != NAMES["bfloat16"]:
        return np.array(value.numpy())
    shape, dtype = tuple(value.shape()), dtype_of("bfloat16")
    nbytes = value.tensor_size_in_bytes()
    data = ctypes.string_at(value.data_ptr(), nbytes) if nbytes else b""  # onnxruntime's numpy() fails for bfloat16
    return np.frombuffer(bytearray(data), dtype).reshape(shape)


def widened(array: np.ndarray) -> np.ndarray:
    """Converts half precision to float32; returns other arrays unchanged."""
    return array.astype(np.float32) if array.dtype.itemsize == 2 and array.dtype.kind in "fV" else array
