# What `surgery.onnx` offers, and from which file each name comes (see `surgery/__init__.pyi`).

from .adapters import read_adapter, write_adapter
from .carried import export_adapter, import_adapter
from .convert import convert_peft
from .export import ExportReport, export_onnx
from .manifest import Manifest
from .parity import ParityReport, verify_onnx
from .runner import OnnxRunner
from .slot import Slot

__all__ = [
    "ExportReport",
    "Manifest",
    "OnnxRunner",
    "ParityReport",
    "Slot",
    "convert_peft",
    "export_adapter",
    "export_onnx",
    "import_adapter",
    "read_adapter",
    "verify_onnx",
    "write_adapter",
]
