"""Declarative model surgery for PyTorch: rules match modules, rewrite their graphs, and are taken out to the bit."""

import lazy_loader

__version__ = "0.1.0"

# The names are listed in `__init__.pyi`; nothing is imported before it is asked for, so that parts which need no torch
# (`surgery.onnx.runtime.runner`) work without it.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
