"""Packed weights of bitsandbytes: `Linear8bitLt` (int8), `Linear4bit` (nf4 and fp4, also double-quantised)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.packed.affine_codes import AffineCodes
from surgery.packed.packed_weight import PackedWeight, class_names, plain_view, register_packed

__all__ = ["Bits4Weight", "Int8Weight"]

INT8, BITS4 = "bitsandbytes.nn.modules.Linear8bitLt", "bitsandbytes.nn.modules.Linear4bit"


@register_packed
class Int8Weight(PackedWeight):
    """The weight of `Linear8bitLt` after quantisation: one int8 code for each number, one scale for each row.

    The tensors are on the weight before the module's first call, and on its `state` afterwards.
    """

    backend = "bitsandbytes"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return INT8 in class_names(module) and weight is not None and weight.dtype == torch.int8

    @property
    def layout(self) -> str:
        return "int8, one scale for each row"

    @property
    def activations(self) -> str | None:
        return "int8, one scale for each row"  # training on a CPU leaves inputs as they are

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.module.weight.shape
        return rows, columns

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def tensors(self) -> dict[str, Tensor]:
        codes, scales = self._source()
        return {"weight": plain_view(codes), "SCB": scales}

    def dequantise(self) -> Tensor:
        codes, scales = self._source()
        # The order of the kernel's operations, which decides about the last bit.
        return plain_view(codes).to(self.dtype, copy=True).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))

    def affine(self) -> AffineCodes:
        codes, scales = self._source()
        return AffineCodes(plain_view(codes), scales.unsqueeze(1).mul(1.0 / 127.0), None, 8)

    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        half = weight.detach().to(torch.float16)
        if scales == "keep":
            stats = self._source()[1]
            rows = half.float() * (127.0 / stats.unsqueeze(1)).nan_to_num(0.0, 0.0, 0.0)
            return {"weight": rows.round().clamp(-127, 127).to(torch.int8), "SCB": stats.clone()}
        codes, stats, _ = import_module("bitsandbytes.functional").int8_vectorwise_quant(half.contiguous())
        return {"weight": codes, "SCB": stats}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        super().write(tensors)
        codes, _ = self._source()
        if codes.data_ptr() != self.module.weight.data_ptr():  # a copied module has the codes twice
            with torch.no_grad():
                self.module.weight.copy_(tensors["weight"])

    def _source(self) -> tuple[Tensor, Tensor]:
        """The codes and scales that the next call uses."""
        weight, state = self.module.weight, self.module.state
        if weight.CB is not None:
            return _shared(weight, weight.CB), weight.SCB
        return (weight if state.CB is None else _shared(weight, state.CB)), state.SCB


@register_packed
class Bits4Weight(PackedWeight):
    """The weight of `Linear4bit` after quantisation: two codes a byte, and one scale for each block.

    With double quantisation, the scales are 8-bit codes with scales of their own. On a CPU with bfloat16 instructions
    an evaluation call rearranges the codes and rounds the scales; `write` brings the arrangement of its tensors back.
    """

    backend = "bitsandbytes"
    rearranges = True

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        weight: Any = module._parameters.get("weight")
        if BITS4 not in class_names(module) or weight is None:
            return False
        state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
        return state is not None and len(state.shape or ()) == 2

    @property
    def layout(self) -> str:
        nested = ", scales in 8 bits" if self._state.nested else ""
        return f"{self._state.quant_type}, blocks of {self._state.blocksize}{nested}"

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self._state.shape
        return rows, columns

    @property
    def dtype(self) -> torch.dtype:
        return self.module.compute_dtype or getattr(self._state, "original_dtype", None) or self._state.dtype

    def tensors(self) -> dict[str, Tensor]:
        state = self._state
        found = {"weight": plain_view(self.module.weight), "absmax": state.absmax}
        if self._rearranged:
            return {f"rearranged_{name}": tensor for name, tensor in found.items()}
        return found | ({"offset": state.offset, "nested_absmax": state.state2.absmax} if state.nested else {})

    def dequantise(self) -> Tensor:
        codes, absmax = self._stored()
        state = self._state
        return torch.ops.bitsandbytes.dequantize_4bit.default(
            codes, absmax, state.blocksize, state.quant_type, list(state.shape), self.dtype
        )

    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        functional: Any = import_module("bitsandbytes.functional")

        state = self._state
        weight = weight.detach().contiguous()
        weight = weight if weight.dtype in (torch.float16, torch.bfloat16, torch.float32) else weight.float()
        if scales == "keep":
            kept = {name: tensor.clone() for name, tensor in self.tensors().items()}
            return kept | {next(iter(kept)): self._codes(weight)}
        nested = state.original_nested if self._rearranged else state.nested
        codes, new = functional.quantize_4bit(
            weight,
            blocksize=state.blocksize,
            compress_statistics=nested,
            quant_type=state.quant_type,
            quant_storage=self._storage,
        )
        more = {"offset": new.offset, "nested_absmax": new.state2.absmax} if nested else {}
        return {"weight": codes, "absmax": new.absmax, **more}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        if self._rearranged != ("rearranged_weight" in tensors):
            self._arrange()
        super().write(tensors)

    def _arrange(self) -> None:
        """Brings codes and scales into the other arrangement, with room for the other's tensors."""
        functional: Any = import_module("bitsandbytes.functional")
        weight: Any = self.module.weight
        state, back = self._state, self._rearranged
        convert = (
            functional._convert_weight_packed_for_cpu_inverse if back else functional._convert_weight_packed_for_cpu
        )
        weight.data, weight.quant_state = convert(weight.data, state)
        if back and not state.nested:  # the library leaves the scales as they are
            state.absmax = state.absmax.T.reshape(-1).float()

    @property
    def _state(self) -> Any:
        return getattr(self.module.weight, "quant_state", None) or self.module.quant_state

    @property
    def _rearranged(self) -> bool:
        return bool(getattr(self._state, "packing_format_for_cpu", False))

    @property
    def _storage(self) -> torch.dtype:
        rearranged = getattr(self._state, "original_storage_type", None) if self._rearranged else None
        return rearranged or self.module.weight.dtype

    def _stored(self) -> tuple[Tensor, Tensor]:
        """The codes in the order of the weight, and the scale of each block as float32."""
        state, codes = self._state, plain_view(self.module.weight)
        if self._rearranged:
            functional: Any = import_module("bitsandbytes.functional")
            plain = copy.copy(state)
            plain.original_nested = False  # the scales as the kernel reads them
            codes, _ = functional._convert_weight_packed_for_cpu_inverse(codes, plain)
            return codes, state.absmax.T.reshape(-1).float()
        if not state.nested:
            return codes, state.absmax.float()
        second = state.state2
        scales = torch.ops.bitsandbytes.dequantize_blockwise.default(
            state.absmax, second.absmax, second.code, second.blocksize, torch.float32
        )
        return codes, scales + state.offset

    def _codes(self, weight: Tensor) -> Tensor:
        """The nearest codes under the scales that are there, in the present arrangement."""
        functional: Any = import_module("bitsandbytes.functional")
        state, (_, absmax) = self._state, self._stored()
        table = functional.get_4bit_type(state.quant_type, device=weight.device)
        order = table.argsort()
        middles = (table[order][:-1] + table[order][1:]) / 2
        numbers = weight.float().flatten()
        scaled = numbers / absmax.repeat_interleave(state.blocksize)[: len(numbers)]
        codes = order[torch.bucketize(scaled.nan_to_num(0.0), middles)].to(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, len(codes) % 2))
        packed = ((codes[::2] << 4) | codes[1::2]).view(self._storage).unsqueeze(1)
        if not self._rearranged:
            return packed
        plain = copy.copy(state)
        plain.nested, plain.absmax = False, absmax
        return functional._convert_weight_packed_for_cpu(packed, plain)[0]


def _shared(weight: Tensor, codes: Tensor) -> Tensor:
    """The parameter where it has the same memory, whose version counts the changes of both."""
    return weight if codes.data_ptr() == weight.data_ptr() else codes
