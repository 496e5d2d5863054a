"""Refuses new values for the tensors of merged adapters: the weights would keep the change of the former values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.patterns.module_walk import RESERVED
from surgery.patterns.wrappers import plain_name
from surgery.state.adapter_tensors import tensors_of
from surgery.state.records import sites
from surgery.transaction.undo_log import Journal

__all__ = ["check_adapter_unmerged", "guard_merged", "merged_error", "unguard_merged"]


def merged_error(path: str, adapters: tuple[str, ...]) -> SurgeryError:
    """The error of a verb that needs this site unmerged."""
    why = f"its weights hold {', '.join(adapters)}"
    return SurgeryError("the model is merged", where=path or "(the model itself)", why=why, fix="unmerge(model) first")


def check_adapter_unmerged(model: nn.Module, adapter: str) -> None:
    """Raise `SurgeryError` if this adapter is merged. Others may be."""
    for path, _, site in sites(model):
        if site.merged is not None and adapter in site.merged.adapters:
            raise merged_error(path, site.merged.adapters)


def guard_merged(model: nn.Module, journal: Journal) -> None:
    """Make `load_state_dict` of a merged model refuse other values for the merged adapters' tensors."""
    journal.keep(model._load_state_dict_pre_hooks)
    model.register_load_state_dict_pre_hook(_refuse_other_values)


def unguard_merged(model: nn.Module, journal: Journal) -> None:
    """Remove the hook of `guard_merged`."""
    for key, hook in list(model._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", None) is _refuse_other_values:
            journal.keep(model._load_state_dict_pre_hooks)
            del model._load_state_dict_pre_hooks[key]


def _refuse_other_values(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """A hook for loaded state dicts. The values that the adapters have are accepted, as the model's own state dict."""
    incoming: dict[str, Any] | None = None
    for path, module, site in sites(model):
        for adapter in site.merged.adapters if site.merged is not None else ():
            for name, tensor in tensors_of(module, adapter).items():
                if incoming is None:
                    incoming = {plain_name(key): value for key, value in state_dict.items()}
                key = ".".join(filter(None, (prefix.rstrip("."), path, RESERVED, adapter, name)))
                value = incoming.get(plain_name(key))
                if isinstance(value, Tensor) and _differs(value, tensor):
                    assert site.merged is not None
                    raise merged_error(path, site.merged.adapters)


def _differs(value: Tensor, tensor: Tensor) -> bool:
    """Whether loading would change the tensor. Another shape is torch's error."""
    if value.shape != tensor.shape or value.is_meta or tensor.is_meta:
        return False
    return not torch.equal(value.detach().to(tensor), tensor.detach())
