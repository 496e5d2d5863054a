"""Reads and writes GGUF files of adapters with the package `gguf`, which is imported when it is used."""

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

__all__ = ["open_gguf", "write_gguf"]

AGAIN = "copy or download the file again, or convert the adapter again"
MOST = 1 << 22  # entries of the header, tensors and fields


def open_gguf(path: Path) -> TensorFile:
    """Opens a GGUF file. Raises `SurgeryError` if it is damaged, or is not an adapter."""
    _check_header(path)
    try:
        from gguf import GGMLQuantizationType as Kind
        from gguf import GGUFReader
    except ImportError:
        raise SurgeryError(
            f"{path.name} can't be read", why="the package gguf is absent", fix="pip install gguf"
        ) from None
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        kinds = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16, Kind.F64: torch.float64}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        data: dict[str, Any] = {}
        for tensor in reader.tensors:
            if tensor.tensor_type not in kinds:
                what = f"the tensor {tensor.name} holds {tensor.tensor_type.name} numbers"
                raise SurgeryError(what, why="F32, F16 and BF16 are read", fix="convert the adapter with --outtype f16")
            name = str(tensor.name)
            shapes[name] = tuple(int(size) for size in reversed(tensor.shape))
            dtypes[name] = kinds[tensor.tensor_type]
            data[name] = tensor.data
    except SurgeryError:
        raise
    except Exception as error:  # a damaged header gives errors of many classes
        why = f"{type(error).__name__}: {error}"[:200]
        raise SurgeryError(f"{path.name} is damaged", why=why, fix=AGAIN) from None
    if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
        what = f"{path.name} is a {fields.get('general.type', 'model')}, and not an adapter of LoRA"
        raise SurgeryError(what, fix="name the adapter's file")

    def read(name: str) -> Tensor:
        flat = torch.from_numpy(_bytes_of(data[name])).view(dtypes[name])
        return flat.reshape(shapes[name])

    return TensorFile(shapes, dtypes, fields, cache(read))


def _bytes_of(data: Any) -> Any:
    import numpy as np

    return np.frombuffer(bytearray(np.ascontiguousarray(data).tobytes()), dtype=np.uint8)


def _check_header(path: Path) -> None:
    """The counts of a header fit the file: a forged count is refused before memory is taken."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(24)
    except OSError as error:
        raise SurgeryError(f"{path.name} can't be read", why=str(error)) from None
    counts = [int.from_bytes(start[at : at + 8], "little") for at in (8, 16)]
    if len(start) < 24 or start[:4] != b"GGUF" or max(counts) > min(size // 8, MOST):
        raise SurgeryError(f"{path.name} is damaged", why="its first bytes are not those of a GGUF file", fix=AGAIN)


def write_gguf(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes an adapter's tensors and fields."""
    try:
        from gguf import GGMLQuantizationType as Kind
        from gguf import GGUFValueType, GGUFWriter
    except ImportError:
        why = "the package gguf is absent"
        raise SurgeryError("a GGUF file can't be written", why=why, fix="pip install gguf") from None
    kinds = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
    tensors = dict(tensors)  # the writer holds all of them
    if wrong := [name for name, tensor in tensors.items() if tensor.dtype not in kinds]:
        raise SurgeryError("GGUF adapters hold float32, float16 and bfloat16", where=wrong[0])
    writer = GGUFWriter(path, str(header["general.architecture"]))
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(header["adapter.lora.alpha"]))
    if tokens := header.get("adapter.alora.invocation_tokens"):
        kind = GGUFValueType.ARRAY, GGUFValueType.UINT32
        writer.add_key_value("adapter.alora.invocation_tokens", list(tokens), *kind)
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            rows = flat.view(torch.uint8).numpy()
            writer.add_tensor(name, rows, raw_shape=rows.shape, raw_dtype=Kind.BF16)
        else:
            writer.add_tensor(name, flat.numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
