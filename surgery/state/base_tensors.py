"""A module's own tensors as the base has them, whatever is merged into them at present."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from surgery.arithmetic.exact_fold import unfold
from surgery.forward.parameter_view import tensor_at
from surgery.state.adapter_tensors import whole
from surgery.state.records import site_state

__all__ = ["base_tensor"]


def base_tensor(module: nn.Module, name: str, path: str = "", state: Mapping[str, Tensor] | None = None) -> Tensor:
    """A parameter or buffer of a module, without what adapters that are merged have folded into it.

    `state`: the model's state dict, to take it from where it was gathered elsewhere.
    """
    site = site_state(module)
    merged = site.merged if site is not None else None
    if merged is not None and name in merged.tied:  # the site has its own in the place of a shared one
        return merged.tied[name].detach()
    key = f"{path}.{name}" if path else name
    tensor = whole((state or {}).get(key, tensor_at(module, name)).detach())
    records = [record for folded, record in merged.folds if folded == name] if merged is not None else []
    if records:
        tensor = tensor.clone()
        for record in reversed(records):
            unfold(tensor, record, where=path)
    return tensor
