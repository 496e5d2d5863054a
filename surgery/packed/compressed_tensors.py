"""compressed-tensors: Linears with codes and scales, before the first forward makes them plain weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.packed.packed_weight import PackedWeight, register_packed

__all__ = ["CompressedWeight"]

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_STORED = ("weight_packed", "weight", "weight_scale", "weight_zero_point")
_BY = {"tensor": "one scale", "channel": "one scale for each row"}


@register_packed
class CompressedWeight(PackedWeight):
    """The weight of a Linear in the state "compressed": packed words, or 8-bit codes, with scales and zero points.

    The model's first forward decompresses all its Linears. From then on they have an ordinary weight.
    """

    backend = "compressed-tensors"
    auxiliary = frozenset(
        f"{part}_{kind}"
        for part in ("weight", "input", "output")
        for kind in ("scale", "zero_point", "global_scale", "shape", "g_idx", "packed")
    )

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        scheme, status = getattr(module, "quantization_scheme", None), getattr(module, "quantization_status", None)
        if scheme is None or getattr(scheme, "weights", None) is None or getattr(status, "value", None) != "compressed":
            return False
        parts = scheme.weights
        known = str(getattr(scheme.format, "value", scheme.format)) in _FORMATS
        known = known and str(getattr(parts.strategy, "value", parts.strategy)) in ("tensor", "channel", "group")
        stored = {*module._parameters, *module._buffers}
        return known and isinstance(module, nn.Linear) and "weight_scale" in stored and "weight_g_idx" not in stored

    @property
    def layout(self) -> str:
        scheme = self.module.quantization_scheme
        parts = scheme.weights
        kind = getattr(parts.type, "value", parts.type)
        groups = _BY.get(getattr(parts.strategy, "value", parts.strategy), f"groups of {parts.group_size}")
        return f"{getattr(scheme.format, 'value', scheme.format)}, {kind}{parts.num_bits}, {groups}"

    @property
    def activations(self) -> str | None:
        parts = self.module.quantization_scheme.input_activations
        return None if parts is None else f"{getattr(parts.type, 'value', parts.type)}{parts.num_bits}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.module.weight_scale.dtype

    def tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self.module, name, None) for name in _STORED}
        return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}

    def dequantise(self) -> Tensor:
        stored: dict[str, Tensor] = self.tensors()
        if "weight_packed" in stored:
            stored |= {"weight_shape": torch.tensor(self.shape, device=self.device)}
        with torch.no_grad():
            return self._compressor.decompress(stored, self.module.quantization_scheme)["weight"].to(self.dtype)

    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        from compressed_tensors.quantization.utils import calculate_qparams  # type: ignore[import-not-found]

        scheme, old = self.module.quantization_scheme, self.tensors()
        parts = scheme.weights
        weight = weight.detach().to(self.dtype)
        with torch.no_grad():
            if scales == "keep":
                scale, zero = old["weight_scale"].clone(), self._zero_points()
            else:
                per_row = 1 if parts.group_size is None else weight.shape[1] // parts.group_size
                groups = weight.flatten().view(1, 1, -1) if old["weight_scale"].numel() == 1 else None
                groups = weight.unflatten(1, (per_row, -1)) if groups is None else groups
                scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), parts)
                scale, zero = (value.reshape(old["weight_scale"].shape) for value in (scale.to(self.dtype), zero))
            plain = {"weight": weight, "weight_scale": scale}
            plain |= {} if zero is None else {"weight_zero_point": zero}
            made = self._compressor.compress(plain, scheme)
        return {name: made[name] for name in old}

    def _zero_points(self) -> Tensor | None:
        stored = self.tensors()
        if "weight_packed" in stored and "weight_zero_point" in stored:
            stored |= {"weight_shape": torch.tensor(self.shape, device=self.device)}
            return self._compressor.decompress(stored, self.module.quantization_scheme)["weight_zero_point"]
        return stored.get("weight_zero_point")

    @property
    def _compressor(self) -> Any:
        from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-not-found]

        kind = self.module.quantization_scheme.format
        return BaseCompressor.get_value_from_registry(getattr(kind, "value", kind))
