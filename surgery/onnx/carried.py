"""A model's adapters as the slots of a file want them, and back: files of onnxruntime's adapter format."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.base_rule import Rule
from surgery.onnx.given import array_of
from surgery.onnx.slots import slot_tensors

__all__ = ["slot_arrays"]


def slot_arrays(model: nn.Module, adapter: str, manifest: Any) -> dict[str, Any]:
    """An adapter's tensors for the slots of a file, scales folded in, as arrays in the slots' dtypes."""
    rules = [Rule.from_dict(one) for one in manifest.rules]
    by_site = {f"{one['site']}:{one['rule']}": rules[one["by"]] for one in manifest.sites}
    found = slot_tensors(model, adapter, by_site, manifest.slot, manifest.constants.get(adapter, ()))
    return {name: array_of(tensor) for name, tensor in found.items()}
