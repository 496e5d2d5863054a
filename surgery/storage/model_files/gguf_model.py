"""Writes a checkpoint of transformers as one GGUF file for llama.cpp, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.errors import SurgeryError, abbreviate
from surgery.progress import Progress, each_step
from surgery.storage.formats import gguf_names as _gguf_names  # registers the names of modules
from surgery.storage.formats.file_tensor import FileTensor
from surgery.storage.formats.layouts import row_order
from surgery.storage.formats.module_names import names_named
from surgery.storage.model_files.checkpoint import Checkpoint
from surgery.storage.model_files.gguf_architectures import OTHER, REMEDY, GgufArchitecture, architecture_of
from surgery.storage.model_files.gguf_values import VALUES, check_rope, rope_factors
from surgery.storage.model_files.gguf_vocabulary import write_vocabulary

__all__ = ["check_gguf", "write_gguf_model"]

_NAMES = _gguf_names
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}  # LLAMA_FTYPE of llama.h


def check_gguf(config: Mapping[str, Any], dtype: torch.dtype | None = None) -> GgufArchitecture:
    """Raises `SurgeryError` for a configuration whose model can't be a GGUF file. Needs no weights."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        why = "the package gguf is absent"
        raise SurgeryError("a GGUF file can't be written", why=why, fix="pip install gguf") from None
    if dtype is not None and dtype not in FLOATS:
        why = "they hold float32, float16 or bfloat16 here"
        raise SurgeryError(f"no GGUF file is written in {dtype}", why=why, fix="llama.cpp's llama-quantize makes it")
    architecture = architecture_of(config)
    check_rope(config, architecture.rope_factors, OTHER)
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation is not None and activation not in architecture.activations:
        why = (
            f"it computes {' or '.join(architecture.activations)} for {architecture.name}, and its files do not say it"
        )
        raise SurgeryError(f"llama.cpp can't compute the activation {activation!r}", why=why, fix=OTHER)
    if config.get("quantization_config"):
        fix = 'quantised="dequantise"'
        raise SurgeryError("quantised weights are not written into a GGUF file", why="llama.cpp has its own", fix=fix)
    return architecture


def write_gguf_model(
    checkpoint: Checkpoint, path: Path, dtype: torch.dtype | None = None, progress: Progress = False
) -> None:
    """Writes the file. Its matrices have the dtype, or the widest of the checkpoint's; vectors are float32."""
    from gguf import GGUFWriter

    architecture = check_gguf(checkpoint.config, dtype)
    tensors = _tensors(checkpoint, architecture)
    dtype = dtype or _widest(tensors)
    stored = {name: dtype if _is_matrix(name, tensor) else torch.float32 for name, tensor in tensors.items()}
    writer = GGUFWriter(path, architecture.name)
    writer.add_type("model")
    for name, tensor in tensors.items():
        _announce(writer, name, tensor.shape, stored[name])
    _add_description(writer, checkpoint.folder)
    add = {"uint32": writer.add_uint32, "float32": writer.add_float32, "string": writer.add_string}
    add |= {"bool": writer.add_bool, "bools": writer.add_array}
    for key, (kind, value) in _fields(architecture, checkpoint.config).items():
        add[kind](f"{architecture.name}.{key}", value)
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_quantization_version(2)
    write_vocabulary(writer, checkpoint)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with each_step(list(tensors.items()), progress, "write") as counted:
            for name, tensor in counted:
                value = _cast(tensor.read(), stored[name], tensor.key).contiguous()
                writer.write_tensor_data(value.reshape(-1).view(torch.uint8).numpy())
    finally:
        writer.close()
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _announce(writer: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Adds a tensor's entry to the header; its numbers follow later."""
    from gguf import GGMLQuantizationType as Kind

    kinds = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
    bytes_of_rows = (*shape[:-1], shape[-1] * dtype.itemsize)  # the form that is the same for all dtypes
    number = torch.empty(0, dtype=torch.uint8).numpy().dtype
    writer.add_tensor_info(name, bytes_of_rows, number, torch.Size(bytes_of_rows).numel(), kinds[dtype])


def _add_description(writer: Any, folder: Path) -> None:
    """Name, size and licence, as the package `gguf` finds them by a folder's name, its model card and settings."""
    from gguf import Metadata, size_label

    counts = writer.get_total_parameter_count()
    metadata = Metadata.load(None, folder, None, counts[0])
    metadata.size_label = metadata.size_label or size_label(*counts)
    metadata.set_gguf_meta_model(writer)


def _fields(architecture: GgufArchitecture, config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """The fields of the architecture: key → type and value."""
    fields: dict[str, tuple[str, Any]] = {}
    for row in architecture.fields:
        first = row.source[0]
        if first.startswith("="):
            value = VALUES[first[1:]](config)
        elif first.startswith("#"):
            value = float(first[1:]) if row.type == "float32" else first[1:]
        else:
            value = next((config[name] for name in row.source if config.get(name) is not None), None)
        if value is not None:
            fields[row.key] = row.type, value
    return fields


# Tensors ------------------------------------------------------------------------------------------------------


def _tensors(checkpoint: Checkpoint, architecture: GgufArchitecture) -> dict[str, FileTensor]:
    """The file's tensors by name. `SurgeryError` for one that has no name there, or that an output lacks."""
    names, config = names_named(architecture.names), checkpoint.config
    tensors: dict[str, FileTensor] = {}
    if architecture.rope_factors and (factors := rope_factors(config)) is not None:
        tensors["rope_freqs.weight"] = FileTensor.of(factors)
    unknown: list[str] = []
    for key, tensor in checkpoint.tensors.items():
        module, _, part = key.rpartition(".")
        place = names.theirs(module)
        if key.endswith(architecture.dropped) and architecture.dropped:
            if tensor.read().count_nonzero():
                raise SurgeryError("llama.cpp has no place for this tensor", where=key, why="it is not zero", fix=OTHER)
            continue
        if place is None or part not in ("weight", "bias"):
            unknown.append(key)
            continue
        if architecture.shifted_norms and key.endswith("norm.weight"):
            tensor = FileTensor(tensor.shape, tensor.dtype, lambda t=tensor: _ordinary(t.read()) + 1, key)
        if place.row.rows:
            order = torch.argsort(row_order(place.row.rows, config, tensor.shape[0]))
            tensor = FileTensor(tensor.shape, tensor.dtype, lambda t=tensor, order=order: t.read()[order], key)
        tensors[f"{place.theirs}.{part}"] = tensor
    if unknown:
        what = f"llama.cpp has no place for {len(unknown)} tensors of this model"
        raise SurgeryError(what, where=abbreviate(unknown, "tensors"), why="its result would not be theirs", fix=REMEDY)
    if wrong := [tensor.key for tensor in tensors.values() if tensor.dtype not in FLOATS]:
        raise SurgeryError("these tensors are not ordinary numbers", where=abbreviate(wrong, "tensors"), fix=REMEDY)
    return tensors


def _ordinary(tensor: Tensor) -> Tensor:
    """float16 and float32 as they are, and others as float32: the numbers in which llama.cpp's converter computes."""
    return tensor if tensor.dtype == torch.float16 else tensor.float()


def _is_matrix(name: str, tensor: FileTensor) -> bool:
    """Whether a tensor has the dtype of the file; llama.cpp takes others in float32 alone."""
    return len(tensor.shape) > 1 and name.endswith(".weight") and not name.endswith("_norm.weight")


def _widest(tensors: Mapping[str, FileTensor]) -> torch.dtype:
    """The dtype that holds all matrices without loss."""
    dtypes = {tensor.dtype for name, tensor in tensors.items() if _is_matrix(name, tensor)}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _cast(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    cast = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not torch.equal(cast.isfinite(), tensor.isfinite()):
        why = f"the largest is {float(tensor.abs().max()):g}, and float16 ends at 65504"
        raise SurgeryError("the numbers of a tensor do not fit float16", where=key, why=why, fix="dtype=torch.bfloat16")
    return cast
