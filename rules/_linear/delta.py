"""Helpers of methods that add ΔW to a plain linear map: which modules they take, and the sizes of the map."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery import LiveSite, Site, packed_weight_of
from surgery.rules._linear import forward_maps
from surgery.rules._linear.layouts import OTHERWISE


def why_no_map(module: nn.Module) -> str | None:
    """Returns why a module is not a plain linear map (Linear, transformers' Conv1D, a quantised Linear), or None."""
    base = getattr(type(module), "_surgery_base", type(module))
    names = [f"{cls.__module__}.{cls.__name__}" for cls in base.__mro__]
    if packed_weight_of(module) is not None:
        return forward_maps.why_not_packed(module)
    if not isinstance(module, nn.Linear) and "transformers.pytorch_utils.Conv1D" not in names:
        return "it goes on Linear and transformers' Conv1D"
    if isinstance(module, nn.Linear) and forward_maps.packed(module):
        return forward_maps.why_not_packed(module)
    return None if forward_maps.torchs_own(module) else OTHERWISE


def sizes(place: Site | LiveSite | nn.Module) -> tuple[int, int]:
    """Returns (out, in), also if the weight is stored as (in, out)."""
    module: Any = place if isinstance(place, nn.Module) else place.module
    packed = packed_weight_of(module)
    if packed is not None:
        return packed.shape
    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else (module.nf, module.nx)


def more_than_weight(module: nn.Module, count: int) -> str | None:
    out, inner = sizes(module)
    return f"{count} entries are more than the {out * inner} of its weight" if count > out * inner else None


def turned(place: Site | LiveSite | nn.Module) -> bool:
    """Whether the weight is stored as (in, out)."""
    module = place if isinstance(place, nn.Module) else place.module
    return not isinstance(module, nn.Linear) and packed_weight_of(module) is None
