"""Turns a quantised module into a plain Linear of its dequantised weight, with the rules that are on it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, dtype, nn

from surgery.packed.packed_weight import PackedWeight
from surgery.packed.quantised_class import AbstractLayout, inherits_from_abc
from surgery.state.kept_codes import KeptCodes
from surgery.state.records import SiteState, site_state
from surgery.transaction.undo_log import Journal
from surgery.weaving.generated_class import swap_class
from surgery.weaving.site_class import install_live

__all__ = ["DequantisedLinear", "replace_packed"]


class DequantisedLinear(nn.Linear):
    """A Linear that computes in the dtype of its input, as kernels of quantised weights do."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype))


class _AbstractDequantisedLinear(AbstractLayout, DequantisedLinear):
    """The same for modules whose class inherits from `abc.ABC`."""


def replace_packed(packed: PackedWeight, journal: Journal | None = None, into: dtype | None = None) -> None:
    """Makes a quantised module a `DequantisedLinear`, in place. The journal's undoing gives the same objects back.

    Args:
        packed: the module's packed weight.
        journal: notes how to undo the change.
        into: the dtype of the plain weight; default: that of the dequantised weight.
    """
    module, state = packed.module, site_state(packed.module)
    (out_features, in_features), stored = packed.shape, {id(tensor) for tensor in packed.tensors().values()}
    plain_dtype = into or packed.dtype
    records = {
        id(record): record.as_plain(packed, plain_dtype)
        for applied in (state.applied if state is not None else ())
        for _, record in applied.changed
        if isinstance(record, KeptCodes)
    }
    weight = nn.Parameter(packed.dequantise().to(plain_dtype), requires_grad=False)
    if journal is not None:
        journal.keep(module.__dict__, module._parameters, module._buffers)
        journal.undo(_set_class, module, "__class__", type(module))
        if state is not None:
            journal.keep(state.__dict__, state.applied, state.variants, state.classes)
            for applied in state.applied:
                journal.keep(applied.__dict__)
    for name in [name for name, tensor in module._buffers.items() if id(tensor) in stored]:
        del module._buffers[name]
    module._parameters["weight"] = weight
    if "bias" not in module._buffers:
        module._parameters.setdefault("bias", None)
    module.__dict__.update(out_features=out_features, in_features=in_features)
    base = _AbstractDequantisedLinear if inherits_from_abc(module) else DequantisedLinear
    swap_class(module, base)
    if state is not None:
        for applied in state.applied:
            applied.changed = [(name, records.get(id(record), record)) for name, record in applied.changed]
        _replace_base(module, state, base, journal)


def _replace_base(module: nn.Module, state: SiteState, base: type[nn.Module], journal: Journal | None) -> None:
    state.base = base
    state.woven = None
    state.classes.clear()
    for applied in state.applied:
        applied.layer = None  # recorded again on the plain weight
    install_live(module, journal)


_set_class = object.__setattr__
