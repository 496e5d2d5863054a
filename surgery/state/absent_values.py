"""Adapter tensors without values: rules were applied on the meta device, and `to_empty` then allocated memory.

Such memory has arbitrary content. It is filled with NaN, and a call of the site is an error until values are written:
by `load_state_dict`, by hand, or by `reset_parameters()` of the tensors' module. So is a call of a site whose base has
values, while the adapter's tensors are still on the meta device: torch computes with them without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SiteError
from surgery.patterns.module_walk import base_modules
from surgery.transaction.undo_log import Journal

__all__ = [
    "base_device",
    "note_absent",
    "refuse_absent",
    "start_again",
    "unwatch_absent",
    "watch_absent",
    "without_values",
]

_ABSENT, _SITE_OF, _START = "_surgery_absent", "_surgery_site_of", "_surgery_start"
Start = Callable[[nn.Module, nn.Module], None]  # sets an adapter's tensors at a site to their initial values


def note_absent(box: nn.Module, before: Mapping[str, Tensor], emptied: bool) -> None:
    """Note which tensors are memory without values, after `_apply` changed an adapter's tensors at a site."""
    names = [name for name in before if _tensor(box, name) is not None and (emptied or before[name].is_meta)]
    for name in names:
        new = _tensor(box, name)
        if new is not None and not new.is_meta:
            with torch.inference_mode(new.is_inference()), torch.no_grad():
                new.detach().fill_(torch.nan if _can_be_nan(new) else 0)
            box.__dict__.setdefault(_ABSENT, set()).add(name)


def without_values(box: nn.Module) -> list[str]:
    """Returns the names of an adapter's tensors at a site that were not written since their allocation."""
    noted: set[str] = box.__dict__.get(_ABSENT, set())
    for name in list(noted):
        tensor: Any = _tensor(box, name)
        local = getattr(tensor, "_local_tensor", tensor)  # this process's part of a sharded tensor
        if local is None or not _can_be_nan(local) or not local.numel() or not bool(local.detach().isnan().all()):
            noted.discard(name)
    return sorted(noted)


def _tensor(box: nn.Module, name: str) -> Tensor | None:
    return box._parameters.get(name, box._buffers.get(name))


def base_device(module: nn.Module) -> torch.device | None:
    """Returns the device of a site's base; None if the base is on the meta device or has no tensors."""
    for _, part in base_modules(module):
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                return None if tensor.is_meta else tensor.device
    return None


def _on_meta(box: nn.Module) -> list[str]:
    tensors = {**box._parameters, **box._buffers}
    return [name for name, tensor in tensors.items() if tensor is not None and tensor.is_meta]


def _can_be_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def watch_absent(module: nn.Module, box: nn.Module, start: Start, journal: Journal) -> None:
    """Check calls of a site, if an adapter's tensors are on the meta device. `start` is for `reset_parameters`."""
    box.__dict__[_SITE_OF], box.__dict__[_START] = module, start
    if refuse_absent not in module._forward_pre_hooks.values():
        journal.undo(unwatch_absent, module)
        module.register_forward_pre_hook(refuse_absent)


def start_again(box: nn.Module) -> None:
    """Set tensors that were created on the meta device to their initial values. Other tensors stay."""
    start: Start | None = box.__dict__.get(_START)
    if start is not None:
        start(box.__dict__[_SITE_OF], box)


def refuse_absent(module: Any, args: Any) -> None:
    """A forward pre-hook of a site: raises `SiteError` for tensors without values, and removes itself without them."""
    if torch.compiler.is_compiling():
        return
    state = module.__dict__.get("_surgery_site")
    boxes = dict(module.adapters._modules) if "adapters" in module._modules else {}
    missing = {name: names for name, box in boxes.items() if (names := without_values(box))}
    real = base_device(module) is not None
    on_meta = {name: names for name, box in boxes.items() if real and (names := _on_meta(box))}
    for applied in state.live() if state is not None else ():
        if state is not None and applied.adapter in {**missing, **on_meta}:
            names = ", ".join(missing.get(applied.adapter) or on_meta[applied.adapter])
            why = "are on the meta device, and the base is not"
            if applied.adapter in missing:
                why = "came from the meta device, so they are memory without numbers"
            raise SiteError(
                f"the adapter {applied.adapter!r} has no values yet",
                where=state.path or "(the model itself)",
                why=f"its {names} {why}",
                fix="load its tensors with load_state_dict or load_adapter_state_dict; or, once the base has its "
                "weights, call reset_parameters() of each module that has it, for the initial values",
            )
    if not missing and not any(tensor.is_meta for tensor in module.parameters()):
        unwatch_absent(module)


def unwatch_absent(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is refuse_absent:
            del module._forward_pre_hooks[key]
