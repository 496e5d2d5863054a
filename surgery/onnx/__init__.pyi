# What `surgery.onnx` offers, and from which file each name comes (see `surgery/__init__.pyi`).

__all__: list[str] = []
