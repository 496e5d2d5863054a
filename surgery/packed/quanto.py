"""optimum-quanto: a frozen `QLinear`, whose weight is a tensor subclass (qint2, qint4, qint8, qfloat8)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.packed.packed_weight import PackedWeight, register_packed

__all__ = ["QuantoWeight"]

# The last one holds the codes as torch's 4-bit kernel reads them. Other subclasses are for kernels of a GPU.
_TINYGEMM = "TinyGemmWeightQBitsTensor"
_KINDS = ("WeightQBytesTensor", "WeightQBitsTensor", _TINYGEMM)


@register_packed
class QuantoWeight(PackedWeight):
    """The weight of a frozen `QLinear`: 8-bit codes with a scale for each row, or 2- and 4-bit codes in groups.

    A `QLinear` that is not frozen has an ordinary weight, which its forward quantises at each call.
    """

    backend = "optimum-quanto"
    auxiliary = frozenset(("input_scale", "output_scale"))

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return type(weight).__name__ in _KINDS and isinstance(module, nn.Linear)

    @property
    def layout(self) -> str:
        weight = self._weight
        groups = getattr(weight, "_group_size", None)
        return f"{weight.qtype.name}, " + ("one scale for each row" if groups is None else f"groups of {groups}")

    @property
    def activations(self) -> str | None:
        kind = getattr(self.module, "activation_qtype", None)
        return None if kind is None else kind.name

    @property
    def shape(self) -> tuple[int, int]:
        out, inner = self._weight.shape
        return out, inner

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    def tensors(self) -> dict[str, Tensor]:
        return _inner(self._weight)

    def dequantise(self) -> Tensor:
        weight = self._weight
        with torch.no_grad():
            if type(weight).__name__ != _TINYGEMM:
                return weight.dequantize()
            # `dequantize` rounds the shift once more. The kernel itself gives the values of a unit matrix.
            unit = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
            return torch.nn.functional.linear(unit, weight).t().contiguous()

    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        from optimum.quanto import AbsmaxOptimizer, MaxOptimizer  # type: ignore[import-not-found]
        from optimum.quanto.tensor.weights import quantize_weight  # type: ignore[import-not-found]

        old, grouped = self._weight, self._weight.qtype.bits < 8
        axis = 0 if old.axis is None else old.axis
        weight = weight.detach().to(self.dtype)
        optimizer = getattr(self.module, "optimizer", None)
        with torch.no_grad():
            if not grouped:
                fit = optimizer or AbsmaxOptimizer()
                scale = old._scale.clone() if scales == "keep" else fit(weight, qtype=old.qtype, axis=axis)
                made = quantize_weight(weight, old.qtype, axis, _nonzero(scale), optimized=False)
            else:
                fit = optimizer or MaxOptimizer()
                if scales == "keep" and type(old).__name__ == _TINYGEMM:
                    return _tinygemm_codes(old, weight)
                shift = getattr(old, "_shift", None)
                zeropoint = shift is not None and not shift.dtype.is_floating_point
                if scales == "keep":
                    scale, shift = old._scale.clone(), old._shift.clone()
                else:
                    settings = {"qtype": old.qtype, "axis": axis, "group_size": old._group_size}
                    scale, shift = fit(weight, zeropoint=zeropoint, **settings)
                scale = _nonzero(scale)
                made = quantize_weight(weight, old.qtype, axis, scale, shift, old._group_size, optimized=False)
                made = made.optimize() if type(old).__name__ == _TINYGEMM else made
        return _inner(made)

    @property
    def _weight(self) -> Any:
        weight = self.module.weight
        return weight.data if type(weight) is nn.Parameter else weight


def _inner(weight: Any) -> dict[str, Tensor]:
    """The plain tensors of a weight by name: codes, scales, and the shifts of grouped codes."""
    tensors = {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}
    return tensors | {"_data": getattr(weight._data, "_data", weight._data)}


def _tinygemm_codes(old: Any, weight: Tensor) -> dict[str, Tensor]:
    """Codes for torch's kernel, which computes scale * (code - 8) + middle."""
    groups = weight.float().unflatten(1, (-1, old._group_size))
    scale, middle = old._scale_shift.float().permute(1, 0, 2).unsqueeze(2).unbind(-1)
    codes = (torch.round((groups - middle) / scale) + 8).clamp(0, 15).to(torch.uint8).flatten(1)
    return {"_data": type(old._data).pack(codes)._data, "_scale_shift": old._scale_shift.clone()}


def _nonzero(scale: Tensor) -> Tensor:
    """A row of zeros has the scale 0, and 0 / 0 is not a code."""
    return scale.masked_fill(scale == 0, 1)
