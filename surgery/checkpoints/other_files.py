"""Copies what a checkpoint's folder holds beside its weights: configuration, tokenizer, code of the model."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Set
from pathlib import Path

from surgery.checkpoints.merge_record import FOLDER

__all__ = ["copy_folder", "copy_other_files"]

# Endings of files with weights: another format of the same weights, which are not merged.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx", ".onnx_data",
            ".index.json", ".tflite", ".mlmodel")  # fmt: skip
# Folders of weights in other formats.
_FOLDERS = ("onnx", "openvino", "original", "coreml", FOLDER)


def copy_other_files(source: Path, target: Path, written: Collection[str]) -> list[str]:
    """Copies files and folders, but for weights and hidden entries. Returns the names that are left out.

    Links to folders above them, links to nothing and special files can't be copied, and are left out.

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
                left_out += copy_folder(entry, target / entry.name, entry.name, {source.resolve()})
        elif entry.name.endswith(_WEIGHTS) or not entry.is_file():
            left_out.append(entry.name)
        else:
            shutil.copyfile(entry, target / entry.name)
    return left_out


def copy_folder(source: Path, target: Path, name: str = "", above: Set[Path] = frozenset()) -> list[str]:
    """Copies a folder with all that it holds, but for what can't be copied, which is returned.

    `name`: the folder's name in the result. `above`: the folders that contain it.
    """
    if (real := source.resolve()) in above:
        return [f"{name}/"]
    target.mkdir(exist_ok=True)
    left_out: list[str] = []
    for entry in sorted(source.iterdir()):
        own = f"{name}/{entry.name}"
        if entry.is_dir():
            left_out += copy_folder(entry, target / entry.name, own, above | {real})
        elif entry.is_file():
            shutil.copyfile(entry, target / entry.name)
        else:
            left_out.append(own)
    return left_out
