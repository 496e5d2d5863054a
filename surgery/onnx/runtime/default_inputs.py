"""What slots that are required inputs are fed without an adapter: the base's numbers stand in a file beside the graph.

An input that must be fed can't have a value in the graph; runtimes that can feed no others, such as onnxruntime-web,
read it from here. The file is an adapter: for every slot what it is without one.
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
    """`arrays`: of every slot. `LoadError` where they don't fit the slots."""
    return write_adapter(beside(onnx_path), arrays, manifest)


def defaults_of(onnx_path: str | Path, manifest: Manifest) -> dict[str, np.ndarray | None]:
    """What each slot is without an adapter; None where that stands nowhere but in the graph, or in a file that is lost.

    Raises `LoadError` for a damaged file.
    """
    defaults = {slot.name: manifest.default(slot) for slot in manifest.slots}
    file = beside(Path(onnx_path))
    if manifest.slots_as == "inputs" and any(array is None for array in defaults.values()) and file.exists():
        defaults.update(read_adapter(file, manifest))
    return defaults


def beside(onnx_path: Path) -> Path:
    return onnx_path.with_name(onnx_path.name + DEFAULTS)
