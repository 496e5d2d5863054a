"""Packed weights of torchao: tensor subclasses in the place of a Linear's weight, with int1 to int8 or float8 codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.packed.affine_codes import AffineCodes
from surgery.packed.packed_weight import PackedWeight, register_packed

__all__ = ["TorchaoWeight", "quantised_as"]


@register_packed
class TorchaoWeight(PackedWeight):
    """The weight of a Linear after torchao's `quantize_`: a tensor subclass that contains codes and scales.

    `Int4Tensor` has a file of its own. Other layouts that only a GPU's kernel can read are not among them.
    """

    backend = "torchao"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return type(weight).__name__ in _KINDS and isinstance(module, nn.Linear) and weight is not None

    @property
    def layout(self) -> str:
        weight = self._weight
        codes = str(getattr(weight, "target_dtype", weight.qdata.dtype)).removeprefix("torch.")
        return f"{codes}, {_blocks(weight.block_size, weight.shape)}"

    @property
    def activations(self) -> str | None:
        weight = self._weight
        if (settings := getattr(weight, "act_quant_kwargs", None)) is not None:
            codes = str(getattr(settings, "float8_dtype", torch.int8)).removeprefix("torch.")
            return f"{codes}, {type(settings.granularity).__name__}"
        kind = getattr(weight, "activation_quantization", None)
        return None if kind is None else str(getattr(kind, "value", kind))

    @property
    def passes_gradient(self) -> bool:
        return self.activations is None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self._weight.shape
        return rows, columns

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    def tensors(self) -> dict[str, Tensor]:
        names, _ = self._weight.__tensor_flatten__()
        return {name: getattr(self._weight, name) for name in names}

    def dequantise(self) -> Tensor:
        with torch.no_grad():
            return self._weight.dequantize()

    def affine(self) -> AffineCodes | None:
        weight = self._weight
        if type(weight).__name__ == "Float8Tensor" or weight.block_size[0] != 1 or weight.scale.dtype != self.dtype:
            return None
        bits = {"int4": 4, "int8": 8}.get(str(getattr(weight, "target_dtype", "torch.int8")).removeprefix("torch."))
        zeros = weight.zero_point
        if bits is None or (zeros is not None and zeros.is_floating_point()):
            return None
        symmetric = zeros is None or not bool(zeros.any())
        return AffineCodes(weight.qdata, weight.scale, None if symmetric else zeros, bits)

    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        old = self._weight
        weight = weight.detach().to(self.dtype)
        made = quantised_as(old, weight, scales == "keep")
        kept = {name: tensor.clone() for name, tensor in self.tensors().items()}
        return kept | {name: getattr(made, name) for name in made.__tensor_flatten__()[0]}

    @property
    def _weight(self) -> Any:
        weight = self.module.weight
        return weight.data if type(weight) is nn.Parameter else weight


def quantised_as(old: Any, weight: Tensor, keep: bool) -> Any:
    """A tensor of torchao with new values in the layout of another. `keep`: with its scales."""
    return _KINDS[type(old).__name__](old, weight, keep)


def _int8(old: Any, weight: Tensor, keep: bool) -> Any:
    from torchao.quantization import PerTensor

    return type(old).from_hp(
        weight,
        PerTensor() if tuple(old.block_size) == tuple(weight.shape) else _granularity(old.block_size, weight.shape),
        mapping_type=_mapping(old),
        scale=old.scale.clone() if keep else None,
        zero_point=old.zero_point.clone() if keep and old.zero_point is not None else None,
        reduce_range=old.reduce_range,
    )


def _intx(old: Any, weight: Tensor, keep: bool) -> Any:
    settings: dict[str, Any] = {"mapping_type": _mapping(old)}
    if keep:
        settings |= {"intx_choose_qparams_algorithm": None, "custom_scale": old.scale.clone()}
        settings |= {"custom_zero_point": old.zero_point.clone()}
    made = type(old).from_hp(weight, tuple(old.block_size), old.target_dtype, **settings)
    if made.scale.dtype != old.scale.dtype:
        from torchao.quantization.quant_api import _adjust_scale_dtype_in_intx_unpacked_tensor as in_dtype

        in_dtype(made, weight, old.scale.dtype)
    return made


def _float8(old: Any, weight: Tensor, keep: bool) -> Any:
    from torchao.quantization.quant_primitives import _quantize_affine_float8

    made = type(old).from_hp(
        weight,
        float8_dtype=old.qdata.dtype,
        granularity=_granularity(old.block_size, weight.shape),
        kernel_preference=old.kernel_preference,
    )
    if keep:
        made.scale = old.scale.clone()
        made.qdata = _quantize_affine_float8(weight, made.scale, old.qdata.dtype)
    return made


def _granularity(block_size: Any, shape: torch.Size) -> Any:
    from torchao.quantization import PerBlock, PerGroup, PerRow, PerTensor

    block, sizes = tuple(block_size), tuple(shape)
    if block == sizes:
        return PerTensor()
    if block[0] == 1:
        return PerRow() if block[1] == sizes[1] else PerGroup(block[1])
    return PerBlock(block)


def _blocks(block_size: Any, shape: torch.Size) -> str:
    block, sizes = tuple(block_size), tuple(shape)
    if block == sizes:
        return "one scale"
    return "one scale for each row" if block == (1, sizes[1]) else f"blocks of {' × '.join(map(str, block))}"


def _mapping(old: Any) -> Any:
    from torchao.quantization import MappingType

    symmetric = old.zero_point is None or not bool(old.zero_point.any())
    return MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC


# How each class is made anew from a plain weight, with the same settings.
_KINDS: dict[str, Callable[[Any, Tensor, bool], Any]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Float8Tensor": _float8,
}
