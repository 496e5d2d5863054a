"""Copies what a checkpoint's folder holds beside its weights: configuration, tokenizer, code of the model."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from surgery.checkpoints.merge_record import FOLDER

__all__ = ["copy_other_files"]

# Endings of files with weights: another format of the same weights, which are not merged.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx", ".onnx_data",
            ".index.json", ".tflite", ".mlmodel")  # fmt: skip
# Folders of weights in other formats.
_FOLDERS = ("onnx", "openvino", "original", "coreml", FOLDER)


def copy_other_files(source: Path, target: Path, written: Collection[str]) -> list[str]:
    """Copies files and folders, but for weights and hidden entries. Returns the names that are left out.

    `written`: names of files that are in the target already.
    """
    left_out: list[str] = []
    for entry in sorted(source.iterdir()):
        if entry.name in written or entry.name.startswith("."):
            continue
        if entry.is_dir():
            if entry.name in _FOLDERS:
                left_out.append(f"{entry.name}/")
            else:
                shutil.copytree(entry, target / entry.name, dirs_exist_ok=True)
        elif entry.name.endswith(_WEIGHTS):
            left_out.append(entry.name)
        elif entry.is_file():
            shutil.copyfile(entry, target / entry.name)
    return left_out
