"""Default values of slots that are required inputs, in a file beside the graph.

A required input can't have a default value in the graph. Runtimes without optional inputs, such as onnxruntime-web,
read the defaults from this file, which is an adapter with a tensor for every slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.onnx.runtime.adapter_file import read_adapter, write_adapter
from surgery.onnx.runtime.manifest import Manifest

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DEFAULTS", "defaults_of", "write_defaults"]

DEFAULTS = ".defaults.onnx_adapter"


def write_defaults(onnx_path: Path, arrays: Mapping[str, np.ndarray], manifest: Manifest) -> Path:
    """Writes an array for every slot. Raises `LoadError` if they do not fit the slots."""
    return write_adapter(defaults_path(onnx_path), arrays, manifest)


def defaults_of(onnx_path: str | Path, manifest: Manifest) -> dict[str, np.ndarray | None]:
    """Returns each slot's value without an adapter; None if only the graph has it, or the file of defaults is missing.

    Raises `LoadError` if the file is damaged.
    """
    defaults = {slot.name: manifest.default(slot) for slot in manifest.slots}
    file = defaults_path(Path(onnx_path))
    if manifest.slots_as == "inputs" and any(array is None for array in defaults.values()) and file.exists():
        defaults.update(read_adapter(file, manifest))
    return defaults


def defaults_path(onnx_path: Path) -> Path:
    return onnx_path.with_name(onnx_path.name + DEFAULTS)
