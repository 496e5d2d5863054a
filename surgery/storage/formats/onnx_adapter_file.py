"""Reads and writes `.onnx_adapter` files with onnxruntime, which is imported when it is used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.adapter_files.tensor_files import TensorFile
from surgery.errors import SurgeryError

__all__ = ["open_onnx_adapter", "write_onnx_adapter"]

DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}


def _format() -> Any:
    try:
        from onnxruntime import AdapterFormat
    except ImportError:
        why = "the package onnxruntime is absent"
        raise SurgeryError("an .onnx_adapter file can't be used", why=why, fix="pip install onnxruntime") from None
    return AdapterFormat


def open_onnx_adapter(path: Path) -> TensorFile:
    """Opens an adapter for a graph of ONNX. Raises `SurgeryError` if it is damaged."""
    try:
        values = _format().read_adapter(str(path)).get_parameters()
    except SurgeryError:
        raise
    except Exception as error:  # onnxruntime raises errors of its own
        raise SurgeryError(
            f"{path.name} is damaged", why=str(error)[:200], fix="copy or download the file again, or save it again"
        ) from None
    if others := [name for name, value in values.items() if value.data_type() not in DTYPES]:
        what = f"the tensor {others[0]} holds {values[others[0]].data_type()}"
        raise SurgeryError(what, why="float32 and float16 are read", fix="export the adapter without quantisation")
    shapes = {name: tuple(value.shape()) for name, value in values.items()}
    dtypes = {name: DTYPES[value.data_type()] for name, value in values.items()}
    read = cache(lambda name: torch.from_numpy(values[name].numpy().copy()))
    return TensorFile(shapes, dtypes, {}, read)


def write_onnx_adapter(path: Path, tensors: Mapping[str, Tensor]) -> None:
    adapter = _format()()
    from onnxruntime import OrtValue

    tensors = dict(tensors)  # the writer holds all of them
    if wrong := [name for name, tensor in tensors.items() if tensor.dtype not in DTYPES.values()]:
        raise SurgeryError("an .onnx_adapter file holds float32 and float16", where=wrong[0])
    adapter.set_adapter_version(1)
    adapter.set_model_version(0)
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
    adapter.set_parameters({name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    adapter.export_adapter(str(path))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
