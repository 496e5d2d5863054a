"""Models as ONNX files whose adapters are swapped at run time. What runs them needs no torch.

    export      export_onnx, verify_onnx, export_adapter, ExportReport, ParityReport
    run         OnnxRunner, Manifest, Slot, read_adapter, write_adapter
    convert     convert_peft, import_adapter

`help(surgery.onnx.OnnxRunner)` documents a class.
"""

import lazy_loader

from surgery.short_help import shorten_help

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
shorten_help(globals())
