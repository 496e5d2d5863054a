# What `surgery.onnx` offers, and from which file each name comes (see `surgery/__init__.pyi`).

from .adapters import read_adapter, write_adapter
from .convert import convert_peft
from .manifest import Manifest, Slot
from .runner import OnnxRunner

__all__ = [
    "Manifest",
    "OnnxRunner",
    "Slot",
    "convert_peft",
    "read_adapter",
    "write_adapter",
]
