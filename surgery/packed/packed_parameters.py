"""Detects parameters that are not plain tensors, of layouts that are known (`packed_by_name`) or not."""

from __future__ import annotations

from torch import Tensor, nn

from surgery.complex_numbers import narrow
from surgery.packed.packed_map import packed_by_name

__all__ = ["UNPACKED", "is_packed", "packed_in", "way_without_packing"]

UNPACKED = (
    "work on the base as it was before it was quantised: load that one, put the adapter on it, "
    "merge_to(model, folder), and quantise what that writes"
)
# transformers' settings that load packed experts as plain ones, by the name of a class.
_CONFIGS = {"Mxfp4GptOssExperts": "Mxfp4Config", "FP8Experts": "FineGrainedFP8Config"}


def is_packed(tensor: Tensor | None) -> bool:
    """Whether a parameter packs its numbers: a tensor subclass, integers or bytes. A sharded parameter does not."""
    if tensor is None or hasattr(tensor, "device_mesh"):
        return False
    return type(tensor) not in (nn.Parameter, Tensor) or narrow(tensor)


def packed_in(module: nn.Module) -> str | None:
    """Describes the packed parameters of a module, or its packed buffers; None if it does not have any."""
    packed = [(name, tensor) for name, tensor in module._parameters.items() if tensor is not None and is_packed(tensor)]
    parts = packed_by_name(module)
    if parts and (not packed or "weight" not in parts):
        first = next(iter(parts.values()))
        return f"{', '.join(parts)} is packed ({first.backend}, {first.layout})"
    if not packed:
        return None
    names = ", ".join(name for name, _ in packed)
    kind = type(packed[0][1]).__name__
    return f"{names} is a {kind if kind != 'Parameter' else packed[0][1].dtype}"


def way_without_packing(module: nn.Module) -> str:
    """What to do about a rule that can't use a packed module. transformers can load its stacks of experts unpacked."""
    for cls in type(module).__mro__:
        if cls.__name__ in _CONFIGS and cls.__module__.startswith("transformers."):
            config = _CONFIGS[cls.__name__]
            return f"load the model with plain weights: quantization_config={config}(dequantize=True)"
    return UNPACKED
