# What `surgery.onnx` offers, and from which file each name comes (see `surgery/__init__.pyi`).

from .checking.adapter_transfer import export_adapter, import_adapter
from .checking.parity import ParityReport, verify_onnx
from .conversion.convert import convert_peft
from .export import ExportReport, export_onnx
from .runtime.adapter_file import read_adapter, write_adapter
from .runtime.manifest import Manifest
from .runtime.runner import OnnxRunner
from .runtime.slot import Slot

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
