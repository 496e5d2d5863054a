"""Element types under their names in a manifest, in numpy and in onnxruntime."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np

from surgery.errors import SurgeryError

__all__ = ["NAMES", "array_of_value", "dtype_of", "name_of", "describe_dtype", "value_of", "widened"]

BF16 = 16  # its number in ONNX: numpy has no such type of its own
NAMES = {
    "float32": "tensor(float)", "float64": "tensor(double)", "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)", "int64": "tensor(int64)", "int32": "tensor(int32)", "int16": "tensor(int16)",
    "int8": "tensor(int8)", "uint64": "tensor(uint64)", "uint32": "tensor(uint32)", "uint16": "tensor(uint16)",
    "uint8": "tensor(uint8)", "bool": "tensor(bool)",
}  # fmt: skip
_BY_RUNTIME = {theirs: name for name, theirs in NAMES.items()}


def dtype_of(name: str) -> np.dtype:
    """numpy's type of this name; bfloat16 is brought by ml_dtypes."""
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            fix = "pip install ml_dtypes"
            raise SurgeryError("bfloat16 needs ml_dtypes", why="numpy has no such type", fix=fix) from None
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@lru_cache
def describe_dtype(dtype: np.dtype) -> str:
    """The name of one of numpy's types, which numpy itself makes anew each time."""
    return dtype.name


def name_of(runtime: str) -> str | None:
    """The name of a type as onnxruntime says it, `tensor(float)`; None for what is not a tensor of numbers."""
    return _BY_RUNTIME.get(runtime)


def value_of(array: np.ndarray) -> Any:
    """An OrtValue on an array's memory, which it keeps alive."""
    import onnxruntime

    array = np.ascontiguousarray(array) if array.ndim else array
    if describe_dtype(array.dtype) == "bfloat16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BF16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def array_of_value(value: Any) -> np.ndarray:
    """An OrtValue's numbers, in memory of their own."""
    if value.data_type() != NAMES["bfloat16"]:
        return np.array(value.numpy())
    shape, dtype = tuple(value.shape()), dtype_of("bfloat16")
    nbytes = value.tensor_size_in_bytes()
    data = ctypes.string_at(value.data_ptr(), nbytes) if nbytes else b""  # onnxruntime gives numpy no bfloat16
    return np.frombuffer(bytearray(data), dtype).reshape(shape)


def widened(array: np.ndarray) -> np.ndarray:
    """Half-precision numbers as float32, to compute with; others as they are."""
    return array.astype(np.float32) if array.dtype.itemsize == 2 and array.dtype.kind in "fV" else array
