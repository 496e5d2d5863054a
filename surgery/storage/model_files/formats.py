"""The formats in which `merge_to` writes whole models, by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from surgery.errors import SurgeryError, SurgeryWarning, near_misses
from surgery.progress import Progress
from surgery.storage.model_files.checkpoint import open_checkpoint_folder
from surgery.storage.model_files.gguf_model import check_gguf, write_gguf_model
from surgery.storage.model_files.mlx_folder import check_mlx, write_mlx_folder

__all__ = ["ModelFormat", "check_model_format", "write_model"]

ModelFormat = Literal["transformers", "gguf", "mlx"]


def check_model_format(
    name: str, model: Any, target: Path, quantised: str | None = None, dtype: torch.dtype | None = None
) -> None:
    """Raises `SurgeryError` for a model that a format can't hold, as far as its configuration shows it.

    `quantised`: "dequantise" if the quantised weights will not be written.
    """
    names = get_args(ModelFormat)
    if name not in names:
        why = near_misses(str(name), names) or None
        raise SurgeryError(f"merge_to has no format {name!r}", why=why, fix=f"one of {', '.join(names)}")
    if name == "transformers":
        return
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    if quantised == "dequantise":
        config.pop("quantization_config", None)
    computes_windows = False
    if name == "gguf":
        if target.is_dir() or target.suffix != ".gguf":
            raise SurgeryError(f"{target} does not name a GGUF file", fix='name one: "model.gguf"')
        rows = check_gguf(config, dtype).fields
        computes_windows = any(row.key == "attention.sliding_window" for row in rows)
    else:
        computes_windows = check_mlx(config, dtype).windows
    if (size := config.get("sliding_window")) and not computes_windows:
        engine = "llama.cpp" if name == "gguf" else "mlx-lm"
        warnings.warn(
            f"{engine} computes attention in full where this model has windows of {size} tokens: its outputs for "
            "longer texts differ from the model's",
            SurgeryWarning,
            stacklevel=4,
        )


def write_model(
    name: str, folder: Path, place: Path, file_name: str, dtype: torch.dtype | None, progress: Progress = False
) -> Path:
    """Makes a format's files from a checkpoint's folder. Returns the folder of the files, or the one file."""
    if name == "transformers":
        return folder
    checkpoint = open_checkpoint_folder(folder)
    if name == "gguf":
        file = place / file_name
        write_gguf_model(checkpoint, file, dtype, progress)
        return file
    return write_mlx_folder(checkpoint, place / "written", dtype, progress)
