"""Makes a quantised module plain, with the rules that are on it."""

from __future__ import annotations

from typing import Any

from torch import dtype, nn

from surgery.packed.packed_map import packed_by_name
from surgery.packed.plain_module import DequantisedLinear
from surgery.state.kept_codes import KeptCodes
from surgery.state.packed_module import become_plain
from surgery.state.records import SiteState, site_state
from surgery.weaving.generated_class import swap_class
from surgery.weaving.site_class import install_live

__all__ = ["DequantisedLinear", "replace_packed"]


def replace_packed(module: nn.Module, into: dtype | None = None, config: Any = None) -> None:
    """Makes a quantised module plain, in place and for good. A Linear then computes in the dtype of its input.

    Args:
        module: the quantised module.
        into: the dtype of the plain weights; default: that of the dequantised weight.
        config: the model's configuration, for experts.
    """
    state, packed = site_state(module), packed_by_name(module)
    plain_dtype = into or next(iter(packed.values())).dtype
    records = {
        id(record): record.as_plain(packed[name], plain_dtype)
        for applied in (state.applied if state is not None else ())
        for name, record in applied.changed
        if isinstance(record, KeptCodes)
    }
    plain = become_plain(module, plain_dtype, in_any_dtype=True, config=config)
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.requires_grad_(False)
    swap_class(module, plain.plain)
    if state is not None:
        for applied in state.applied:
            applied.changed = [(name, records.get(id(record), record)) for name, record in applied.changed]
        _replace_base(module, state, plain.plain)


def _replace_base(module: nn.Module, state: SiteState, base: type[nn.Module]) -> None:
    state.base = base
    state.woven = None
    state.classes.clear()
    for applied in state.applied:
        applied.layer = None  # recorded again on the plain weight
    install_live(module, None)
