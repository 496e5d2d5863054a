"""GPTQ: weights of 2, 3, 4 or 8 bits in the buffers qweight, qzeros, scales and g_idx, of auto-gptq and gptqmodel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from surgery.packed.affine_codes import AffineCodes
from surgery.packed.bit_packing import pack_words, unpack_words
from surgery.packed.grids import fit_grid, nearest_codes
from surgery.packed.packed_weight import PackedWeight, register_packed
from surgery.packed.quantised_class import base_of, runs_more, short_names

__all__ = ["GptqWeight"]

# Classes whose forward computes with the four buffers as they are. Other kernels (Marlin, ExLlama, …) rearrange them.
_KERNELS = {
    "QuantLinear",
    "TorchLinear",
    "TorchAtenLinear",
    "TorchQuantLinear",
    "TritonV2Linear",
    "TritonV2QuantLinear",
}
_OTHERS = {"TorchQuantEmbeddings", "_MlxLinearContract"}
_REARRANGING = ("exllama", "marlin", "qigen", "hpu", "ipex", "bitblas", "machete")
_BUFFERS = ("qweight", "qzeros", "scales", "g_idx")


@register_packed
class GptqWeight(PackedWeight):
    """The weight of auto-gptq's `QuantLinear` or of gptqmodel's `TorchLinear`.

    `qweight` holds codes (in, out), packed along the inputs. `qzeros` holds a zero point and `scales` a scale for each
    group and output. `g_idx` holds the group of each input. The weight is scales[g_idx] * (code - zero[g_idx]).
    Version 1 of the format stores each zero point minus one; version 2 stores the zero point.

    Source: Frantar et al. 2022, arXiv:2210.17323; the packages' torch kernels.
    """

    backend = "gptq"
    auxiliary = frozenset(("wf_unsqueeze_zero", "wf_unsqueeze_neg_one", "wf"))

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        names = short_names(module)
        if not names & _KERNELS or names & _OTHERS or any(name not in module._buffers for name in _BUFFERS):
            return False
        kernel = next(base for base in base_of(module).__mro__ if base.__name__ in _KERNELS)
        if (
            any(word in kernel.__module__ for word in _REARRANGING)
            or getattr(module, "planar", False)
            or runs_more(module)
        ):
            return False
        weight, g_idx = module._buffers["qweight"], module._buffers["g_idx"]
        bits = getattr(module, "bits", None)
        if type(bits) is not int or weight is None or g_idx is None or weight.dtype is not torch.int32:
            return False
        return bits in (2, 3, 4, 8) and weight.shape[0] == -(-g_idx.numel() * bits // 32)

    @property
    def layout(self) -> str:
        order = ", act-order" if self._shuffled else ""
        return f"{self.module.bits} bits, groups of {self.module.group_size}, version {2 - self._offset}{order}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.qweight.shape[1], self.module.g_idx.numel()

    @property
    def dtype(self) -> torch.dtype:
        return self.module.scales.dtype

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self.module, name) for name in _BUFFERS}

    def dequantise(self) -> Tensor:
        module, groups = self.module, self._groups()
        out, inner = self.shape
        steps = unpack_words(module.qweight, module.bits, inner).to(torch.int16) - self._zeros()[groups]
        return (module.scales[groups] * steps).t().contiguous()

    def affine(self) -> AffineCodes | None:
        module, (_, inner) = self.module, self.shape
        count, size = module.scales.shape[0], module.group_size if module.group_size > 0 else inner
        plain = torch.arange(inner, device=module.g_idx.device) // size
        if module.bits not in (4, 8) or inner % size or count * size != inner or not torch.equal(self._groups(), plain):
            return None
        zeros = self._zeros().t()
        if int(zeros.max()) > 2**module.bits - 1:  # of version 1, where a stored zero point is one less
            return None
        codes = unpack_words(module.qweight, module.bits, inner).t().to(torch.uint8).contiguous()
        return AffineCodes(codes, module.scales.t(), zeros.to(torch.uint8), module.bits)

    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        module, bits, groups = self.module, self.module.bits, self._groups()
        rows = weight.detach().float().t()
        if scales == "keep":
            steps, zeros = module.scales.clone(), self._zeros().long()
        else:
            steps, zeros = fit_grid(
                rows,
                groups,
                module.scales.shape[0],
                bits=bits,
                symmetric=self._symmetric,
                zeros=(self._offset, 2**bits - 1 + self._offset),
                dtype=module.scales.dtype,
            )
        codes = nearest_codes(rows, steps[groups], zeros[groups], bits)
        stored = (zeros - self._offset).to(torch.uint8)
        return {
            "qweight": pack_words(codes, bits, module.qweight.shape[0]),
            "qzeros": pack_words(stored.t(), bits, module.qzeros.shape[1]).t().contiguous(),
            "scales": steps,
            "g_idx": module.g_idx.clone(),
        }

    @property
    def _offset(self) -> int:
        """What the kernel adds to a stored zero point: 1 in version 1 of the format, 0 in version 2."""
        module = self.module
        if getattr(module, "REQUIRES_FORMAT_V2", False):
            return 0
        version = module.qzero_format() if hasattr(module, "qzero_format") else 1
        return 1 if version == 1 else 0

    @property
    def _is_old(self) -> bool:
        """Whether the older kernel of auto-gptq runs, which does not read `g_idx` and cuts zero points."""
        return any(cls.__module__.endswith("qlinear_cuda_old") for cls in base_of(self.module).__mro__)

    def _groups(self) -> Tensor:
        """The group of each input, in int64."""
        g_idx = self.module.g_idx
        if self._is_old:
            return torch.arange(g_idx.numel(), device=g_idx.device) // self.module.group_size
        return g_idx.long()

    def _zeros(self) -> Tensor:
        """The zero points (groups, out) in int16, as the kernel subtracts them."""
        module = self.module
        stored = unpack_words(module.qzeros.t(), module.bits, module.scales.shape[1]).t()
        zeros = stored.to(torch.int16) + self._offset
        return zeros & (2**module.bits - 1) if self._is_old and module.bits != 3 else zeros

    @property
    def _symmetric(self) -> bool:
        known = getattr(self.module, "sym", None)
        if isinstance(known, bool):
            return known
        return bool((self._zeros() == 2 ** (self.module.bits - 1)).all())

    @property
    def _shuffled(self) -> bool:
        groups = self._groups()
        return not groups.is_meta and bool((groups.diff() < 0).any())

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        super().write(tensors)
        clear = getattr(self.module, "clear_weight_cache", None)
        if clear is not None:
            clear()
