"""HQQ: `HQQLinear` of the package hqq, whose codes are the parameter `W_q` and whose scales are in a dictionary."""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.packed.packed_weight import PackedWeight, register_packed
from surgery.packed.quantised_class import base_of, short_names

__all__ = ["HqqWeight"]

_STORED = ("scale", "zero", "zero_scale")


@register_packed
class HqqWeight(PackedWeight):
    """The weight of an `HQQLinear`: (code - zero) * scale, with zero points that are not whole numbers.

    Source: Badri and Shaji 2023, "Half-Quadratic Quantization"; the package's `hqq/core/quantize.py`.
    """

    backend = "hqq"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        if "HQQLinear" not in short_names(module):
            return False
        meta = getattr(module, "meta", None)
        if not isinstance(meta, dict) or getattr(module, "W_q", None) is None:
            return False
        # Older versions of the package could quantise the scales, too.
        return len(meta.get("shape", ())) == 2 and not (meta.get("quant_scale") or meta.get("quant_zero"))

    @property
    def layout(self) -> str:
        meta = self.module.meta
        return f"{meta['nbits']:g} bits, groups of {meta['group_size']} along axis {meta['axis']}"

    @property
    def shape(self) -> tuple[int, int]:
        out, inner = map(int, self.module.meta["shape"])
        return out, inner

    @property
    def dtype(self) -> torch.dtype:
        return self.module.meta.get("compute_dtype", torch.float16)

    def tensors(self) -> dict[str, Tensor]:
        meta = self.module.meta
        return {"W_q": self.module.W_q.detach()} | {name: meta[name] for name in _STORED if name in meta}

    def dequantise(self) -> Tensor:
        with torch.no_grad():
            return self.module.dequantize().clone()

    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        meta, quantizer = self.module.meta, self._quantizer
        settings = dict((self.module.quant_config or {}).get("weight_quant_params", {}))
        settings = {"nbits": meta["nbits"], "group_size": meta["group_size"], "axis": meta["axis"], **settings}
        weight = weight.detach().float()
        with torch.no_grad():
            made = quantizer.quantize(
                weight, device=str(weight.device), compute_dtype=self.dtype, **settings | {"view_as_float": False}
            )
        codes, fitted = made
        scale, zero = (fitted[name].to(self.dtype) for name in ("scale", "zero"))
        if scales == "keep":
            scale, zero = self._grid()
            groups = weight.reshape((-1, meta["group_size"]) if meta["axis"] == 1 else (meta["group_size"], -1))
            groups = groups if settings.get("channel_wise", True) else weight
            highest = round(2 ** meta["nbits"] - 1)
            codes = torch.round(groups / scale.float() + zero.float()).clamp(0, highest)
            codes = quantizer.pack[meta["packing"]](codes) if meta["packing"] else codes
        old = self.tensors()
        codes = codes.contiguous()
        new = {"W_q": codes.view(old["W_q"].dtype) if meta.get("view_as_float") else codes.to(old["W_q"].dtype)}
        stored = {"scale": scale, "zero": zero, "zero_scale": torch.stack((zero, scale))}
        return new | {name: stored[name].to(old[name].dtype) for name in old if name != "W_q"}

    def _grid(self) -> tuple[Tensor, Tensor]:
        meta = self.module.meta
        if "zero_scale" in meta:
            zero, scale = meta["zero_scale"].to(self.device)
            return scale, zero
        return meta["scale"].clone(), meta["zero"].clone()

    @property
    def _quantizer(self) -> Any:
        """The class `Quantizer` beside the class of the module."""
        kind = next(cls for cls in base_of(self.module).__mro__ if cls.__name__ == "HQQLinear")
        return vars(sys.modules[kind.__module__])["Quantizer"]
