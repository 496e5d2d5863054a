"""Reads single weights of an ONNX file, in the shape of the model's parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import SurgeryError

__all__ = ["Weights"]

LAYOUT = "surgery.layout"


class Weights:
    """The initialisers of a file by parameter name. Each is read on access."""

    def __init__(self, path: Path):
        try:
            import onnx
        except ImportError:
            why, fix = "the checkpoint can't be converted without weights of the base", "pip install onnx"
            raise SurgeryError("the onnx package is missing", why=why, fix=fix) from None
        self.onnx, self.folder = onnx, path.parent
        try:
            graph = onnx.load(str(path), load_external_data=False).graph
        except Exception as error:  # protobuf's own
            raise SurgeryError(f"{path.name} is not an ONNX file", why=str(error)[:200]) from None
        self.initializers: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
        values = [*graph.initializer, *graph.value_info]
        self.transposed = {
            value.name for value in values for p in value.metadata_props if (p.key, p.value) == (LAYOUT, "transposed")
        }

    def stored(self, name: str) -> np.ndarray:
        """Returns an initialiser with the file's dtype and axes."""
        if name not in self.initializers:
            raise SurgeryError("the file has no initialiser of this name", where=name)
        return self.onnx.numpy_helper.to_array(self.initializers[name], base_dir=str(self.folder))

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a weight in float64. Raises `SurgeryError` if the file lacks the name, or the weight is quantised."""
        if name not in self.initializers:
            fix = "export_adapter, which has the model's weights"
            raise SurgeryError("the file has no weight of this name", where=name, why="it was folded away", fix=fix)
        array = self.stored(name)
        if array.dtype.kind not in "fV":
            raise SurgeryError("the weight is quantised", where=name, why=f"it is {array.dtype.name}")
        array = array.astype(np.float64)
        return array.T if name in self.transposed else array
