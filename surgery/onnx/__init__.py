"""Models as ONNX files whose adapters are swapped at run time. What runs them needs no torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
