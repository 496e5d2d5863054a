"""DoRA's norms of a quantised weight, kept between calls while neither the codes nor the factors change."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery import packed_weight_of

__all__ = ["changed_norm"]


@dataclass(frozen=True)
class _Norm:
    """The norms for these versions of tensors. The values of A and B are kept: writes to `.data` count no versions."""

    versions: tuple[tuple[int, int], ...]
    A: Tensor
    B: Tensor
    scale: float
    norm: Tensor

    def fits(self, versions: tuple[tuple[int, int], ...], A: Tensor, B: Tensor, scale: float) -> bool:
        return self.versions == versions and self.scale == scale and torch.equal(self.A, A) and torch.equal(self.B, B)


_norms: weakref.WeakKeyDictionary[nn.Module, dict[int, _Norm]] = weakref.WeakKeyDictionary()


def changed_norm(weight: Tensor | nn.Module, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns the norm of each row of W + scale · B A, without a gradient.

    `weight`: W, if other rules edit it; else the quantised module, whose dequantised weight is W.
    """
    with torch.no_grad():
        A, B = A.detach(), B.detach()
        if isinstance(weight, Tensor):
            return _norm(weight.detach(), A, B, scale)
        module = weight
        packed = packed_weight_of(module)
        assert packed is not None
        if not (_has_versions(A) and _has_versions(B)):
            return _norm(packed.dequantise(), A, B, scale)
        try:
            versions = tuple([(t.data_ptr(), t._version) for t in (*packed.tensors().values(), A, B)])
        except RuntimeError:  # tensors of torch.inference_mode count no versions
            return _norm(packed.dequantise(), A, B, scale)
        # Adapters have tensors of their own, so each has an entry; a copied adapter takes the place of a former one.
        entries = _norms.setdefault(module, {})
        known = entries.get(A.data_ptr())
        if known is not None and known.fits(versions, A, B, scale):
            return known.norm
        norm = _norm(packed.dequantise(), A, B, scale)
        if len(entries) >= _MOST:
            entries.clear()
        entries[A.data_ptr()] = _Norm(versions, A.clone(), B.clone(), scale, norm)
        return norm


changed_norm.reads_codes = True  # type: ignore[attr-defined]  # the weave gives it the module for an unedited weight


def _norm(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return torch.linalg.vector_norm(weight.to(A.dtype) + B @ A * scale, dim=1)


def _has_versions(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one: not of a compiler, an exporter or a transformation of torch.func."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[attr-defined]
    return type(tensor) in (Tensor, nn.Parameter) and not wrapped


_MOST = 64  # adapters of one module whose norms are kept
