"""A module's own tensors without merged adapters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from surgery.arithmetic.exact_fold import unfold
from surgery.forward.offloaded_weights import value_at
from surgery.state.adapter_tensors import whole
from surgery.state.merged_tensors import merged_error
from surgery.state.records import site_state

__all__ = ["base_tensor"]


def base_tensor(module: nn.Module, name: str, path: str = "", state: Mapping[str, Tensor] | None = None) -> Tensor:
    """Returns a parameter or buffer of a module, without the folds of merged adapters.

    `state`: a gathered state dict of the model, which is read instead of the module. Default None.
    """
    site = site_state(module)
    merged = site.merged if site is not None else None
    if merged is not None and name in merged.tied:  # the site has a separate copy of a shared parameter
        return merged.tied[name].detach()
    if merged is not None and merged.packed is not None and name in merged.packed.names:
        raise merged_error(path, merged.adapters)
    key = f"{path}.{name}" if path else name
    tensor = whole((state[key] if state is not None and key in state else value_at(module, name)).detach())
    records = [record for folded, record in merged.folds if folded == name] if merged is not None else []
    if records:
        tensor = tensor.clone()
        for record in reversed(records):
            unfold(tensor, record, where=path)
    return tensor
