"""Puts ordinary modules in the places of sites, with the tensors that their adapters trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.lifecycle.commit_objections import CommittedSite
from surgery.patterns.module_walk import base_modules
from surgery.state.record_undo import keep_site
from surgery.state.records import ModelState, base_parameters
from surgery.transaction.gradient_flags import set_flag
from surgery.transaction.undo_log import Journal
from surgery.weaving.site_class import install_live

__all__ = ["replace_modules"]


def replace_modules(
    root: nn.Module, state: ModelState, replaced: Sequence[CommittedSite], freezes: bool, journal: Journal
) -> dict[str, bool]:
    """Put the replacement of each site in its place, under each name that it has.

    Args:
        root: the model.
        state: its record.
        replaced: the sites.
        freezes: whether an adapter that freezes the base stays.
        journal: notes the changes.

    Returns:
        `requires_grad` of the new parameters, by their names in the model.
    """
    if not replaced:
        return {}
    new: dict[int, nn.Module] = {}
    flags: dict[int, bool] = {}
    for site in replaced:
        module, replacement = site.module, site.replacement
        assert replacement is not None
        replacement.train(module.training)
        keep_site(journal, module, {applied.adapter for applied in site.rules})
        install_live(module, journal, live=[])
        _follow_base(root, module, replacement)
        new[id(module)] = replacement
        flags |= {id(parameter): parameter.requires_grad for parameter in replacement.parameters()}
    for parent in list(root.modules()):
        if any(id(child) in new for child in parent._modules.values()):
            journal.keep(parent._modules)
            parent._modules.update(
                {name: new.get(id(child), child) for name, child in parent._modules.items() if child is not None}
            )
    gone = {id(below) for site in replaced for _, below in base_modules(site.module)}
    gone -= {id(module) for _, module in base_modules(root)}
    state.moving[:] = [module for module in state.moving if id(module) not in gone]
    names = dict(base_parameters(root))
    noted = {name: flag for name, flag in state.flags.items() if name in names}
    journal.keep(state.flags)
    state.flags.clear()
    state.flags.update(noted)
    if freezes:
        for parameter in names.values():
            if id(parameter) in flags:
                set_flag(parameter, False, journal)
    return {name: flags[id(parameter)] for name, parameter in names.items() if id(parameter) in flags}


def _follow_base(root: nn.Module, module: nn.Module, replacement: nn.Module) -> None:
    """Give a replacement the dtype of the module's own tensors; without any, that of the model."""
    own = [parameter for owner in (module, root) for _, parameter in base_parameters(owner)]
    dtype = next((parameter.dtype for parameter in own if parameter.is_floating_point()), None)
    present = [*replacement.parameters(), *replacement.buffers()]
    cast = {id(t): _cast(t, dtype) for t in present if dtype is not None and t.is_floating_point() and t.dtype != dtype}
    for _, inner in base_modules(replacement) if cast else ():
        for table in (inner._parameters, inner._buffers):
            table.update({name: cast[id(tensor)] for name, tensor in table.items() if id(tensor) in cast})


def _cast(tensor: Tensor, dtype: torch.dtype) -> Any:
    cast = tensor.detach().to(dtype)
    return nn.Parameter(cast, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cast
