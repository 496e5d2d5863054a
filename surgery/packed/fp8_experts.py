"""Stacks of experts in 8-bit floats or packed 4-bit floats, in transformers' `FP8Experts` and Llama 4's of FBGEMM."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.errors import SiteError
from surgery.packed.e2m1 import e2m1_codes, e2m1_values
from surgery.packed.packed_stack import PackedStack
from surgery.packed.quantised_class import short_names
from surgery.packed.scaled_codes import block_of, by_entry, scale_numbers

__all__ = ["Fp8Stack", "plain_experts", "stacks_of"]

_NAMES = ("gate_up_proj", "up_proj", "down_proj")
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


class Fp8Stack(PackedStack):
    """A stack of codes (experts, rows, columns) with scales for blocks of rows and columns: code · scale.

    Codes are 8-bit floats, or bytes with two 4-bit floats (e2m1), the first in the low half. In `FP8Experts`, rows are
    outputs. In `FbgemmFp8Llama4TextExperts`, rows are inputs, and there is one scale for each output.
    """

    backend = "transformers-fp8"
    auxiliary = frozenset(("input_scale_ub", "gate_up_proj_activation_scale", "down_proj_activation_scale"))

    @property
    def layout(self) -> str:
        codes = "float4 (e2m1)" if self._packs_pairs else str(self._codes.dtype).removeprefix("torch.")
        rows, columns = self._block
        if (rows, columns) == self.shape[1:]:
            return f"{codes}, one scale for each expert"
        by_output = (rows, columns) == ((self.shape[1], 1) if self._of_fbgemm else (1, self.shape[2]))
        return f"{codes}, {'one scale for each output' if by_output else f'blocks of {rows} × {columns}'}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, rows, columns = self._codes.shape
        return experts, rows, columns * (2 if self._packs_pairs else 1)

    def tensors(self) -> dict[str, Tensor]:
        scales = getattr(self.module, self._scale_name)
        return {self.name: self._codes, self._scale_name: scales.detach()}

    def dequantise(self) -> Tensor:
        return self._values(self._codes, self._scales())

    def dequantise_experts(self, experts: Tensor) -> Tensor:
        codes = self._codes.view(torch.int8)[experts].view(self._codes.dtype)
        return self._values(codes, self._scales()[experts])

    def _values(self, codes: Tensor, scales: Tensor) -> Tensor:
        values = e2m1_values(codes.view(torch.uint8)) if self._packs_pairs else codes.float()
        return values.mul_(self._by_entry(scales))

    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        if tuple(weight.shape) != self.shape or not bool(weight.isfinite().all()):
            raise SiteError(
                f"a stack of {tuple(weight.shape)} can't be quantised as {self.name}",
                why=f"the codes are of finite numbers, and the stack is {self.shape}",
            )
        stored, weight = getattr(self.module, self._scale_name).detach(), weight.detach().to(self.device).float()
        greatest = 6.0 if self._packs_pairs else torch.finfo(self._codes.dtype).max
        steps = self._scales()
        if scales == "refit":
            steps = self._largest(weight) / greatest
            steps = steps.masked_fill(steps == 0, 1)
            if stored.dtype in (
                torch.float8_e8m0fnu,
                torch.uint8,
            ):  # powers of two; a smaller one would cut the largest
                steps = torch.exp2(torch.log2(steps).ceil())
        written = self._as_stored(steps, stored)
        ratio = weight / self._by_entry(steps if scales == "keep" else self._as_numbers(written))
        if self._packs_pairs:
            codes = e2m1_codes(ratio).view(self._codes.dtype)
        else:
            codes = ratio.clamp(-greatest, greatest).to(self._codes.dtype)
        return {self.name: codes, self._scale_name: written.clone()}

    @property
    def _of_fbgemm(self) -> bool:
        return "FbgemmFp8Llama4TextExperts" in short_names(self.module)

    @property
    def _codes(self) -> Tensor:
        return self.module._parameters[self.name].detach()

    @property
    def _packs_pairs(self) -> bool:
        return self._codes.dtype not in _EIGHT_BITS

    @property
    def _scale_name(self) -> str:
        return f"{self.name}_scale" if self._of_fbgemm else f"{self.name}_scale_inv"

    def _scales(self) -> Tensor:
        """The scales as numbers, (experts, blocks of rows, blocks of columns)."""
        return self._as_numbers(getattr(self.module, self._scale_name).detach())

    def _as_numbers(self, stored: Tensor) -> Tensor:
        numbers = scale_numbers(stored)
        return numbers.mT if self._of_fbgemm and self.name == "down_proj" else numbers  # stored as (experts, out, 1)

    def _as_stored(self, numbers: Tensor, stored: Tensor) -> Tensor:
        numbers = numbers.reshape(stored.shape)
        if stored.dtype is torch.uint8:  # exponents, with a bias
            return (torch.log2(numbers) + 127).round().clamp(0, 254).to(torch.uint8)
        return numbers.to(stored.dtype)

    @property
    def _block(self) -> tuple[int, int]:
        """The rows and columns of a block. The last block of a row or column may be smaller."""
        _, high, wide = self._scales().shape
        block = None if self._packs_pairs else getattr(self.module, "block_size", None)
        return block_of(self.shape[1:], (high, wide), block)

    def _by_entry(self, scales: Tensor) -> Tensor:
        """The scale of each entry."""
        return by_entry(scales, self.shape[1:], self._block)

    def _largest(self, weight: Tensor) -> Tensor:
        """The largest absolute value of each block."""
        (rows, columns), (experts, high, wide) = self._block, self._scales().shape
        padded = weight.new_zeros(experts, high * rows, wide * columns)
        padded[:, : weight.shape[1], : weight.shape[2]] = weight.abs()
        return padded.view(experts, high, rows, wide, columns).amax((2, 4))


def stacks_of(module: nn.Module) -> dict[str, Fp8Stack]:
    """The stacks of the experts; none before they are loaded, and of modules that have ordinary numbers."""
    stored = {name: module._parameters.get(name) for name in _NAMES}
    return {
        name: Fp8Stack(module, name)
        for name, codes in stored.items()
        if codes is not None and codes.dtype in (*_EIGHT_BITS, torch.int8, torch.uint8) and not codes.is_meta
    }


def plain_experts(module: nn.Module) -> nn.Module:
    """A new module of the experts' class in the model's architecture, on the meta device.

    `FP8Experts` notes the model's configuration. Its architecture has one class of experts with these stacks.
    """
    old: Any = module
    shapes = {name: stack.shape for name, stack in stacks_of(module).items()}
    if "FbgemmFp8Llama4TextExperts" in short_names(module):
        transformers: Any = import_module("transformers")
        sizes = {"hidden_size": old.hidden_size, "intermediate_size": old.intermediate_size}
        config = transformers.Llama4TextConfig(num_local_experts=old.num_experts, num_hidden_layers=1, **sizes)
        candidates = [_experts(import_module("transformers.models.llama4.modeling_llama4").Llama4TextExperts, config)]
        candidates[0].act_fn = old.act_fn
    else:
        candidates = [_experts(cls, old.config) for cls in _classes_of(old.config)]
    fitting = [made for made in candidates if made is not None and _shapes(made, shapes) == shapes]
    if len({type(made) for made in fitting}) != 1:
        kind = type(getattr(old, "config", None)).__name__
        raise SiteError(
            f"the experts of this {type(module).__name__} have no known form without quantisation",
            why=f"{len(fitting)} classes of experts in the architecture of a {kind} have its stacks {shapes}",
            fix="load the model with plain weights: quantization_config=FineGrainedFP8Config(dequantize=True)",
        )
    return fitting[0]


def _shapes(made: nn.Module, names: Any) -> dict[str, tuple[int, ...]]:
    return {n: tuple(tensor.shape) for n in names if (tensor := made._parameters.get(n)) is not None}


def _experts(cls: type[nn.Module], config: Any) -> Any:
    with torch.device("meta"):
        try:
            return cls(config)
        except Exception:  # a class that takes other arguments is not the class of these experts
            return None


def _classes_of(config: Any) -> list[type[nn.Module]]:
    """The classes of experts in the file of a configuration's architecture."""
    file = type(config).__module__.replace(".configuration_", ".modeling_")
    modeling = sys.modules.get(file) or import_module(file)
    return [
        cls
        for _, cls in inspect.getmembers(modeling, inspect.isclass)
        if issubclass(cls, nn.Module) and "Experts" in cls.__name__
    ]
