"""Moves a site's record to a new module that replaces the site's module and keeps its tensors (SyncBatchNorm)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from surgery.errors import SurgeryError
from surgery.patterns.module_walk import RESERVED
from surgery.state.record_undo import keep_site
from surgery.state.records import _SITE, ModelState, model_state, site_state
from surgery.state.site_links import at_path, link_sites
from surgery.transaction.undo_log import Journal
from surgery.weaving.class_objections import reason_against
from surgery.weaving.generated_class import swap_class
from surgery.weaving.site_class import install_live

__all__ = ["follow", "move_record", "unwatch", "watch"]

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def follow(root: nn.Module, state: ModelState, missing: Iterable[nn.Module]) -> list[nn.Module]:
    """Move the records of lost modules to the modules that replaced them; return the modules without a replacement."""
    unreplaced = []
    for old in missing:
        site = site_state(old)
        path, new = at_path(root, site.path) if site is not None else ("", root)
        if site is None or path != site.path or not _took_over(old, new):
            unreplaced.append(old)
            continue
        if (objection := reason_against(new)) is not None:
            what = f"the rules cannot follow from this {type(old).__name__} to a {type(new).__name__}"
            raise SurgeryError(what, where=path, why=objection[0], fix=objection[1])
        with Journal() as journal:
            move_record(state, old, new, journal)
            install_live(new, journal)
    return unreplaced


def _took_over(old: nn.Module, new: nn.Module) -> bool:
    """Whether `new` has the adapters and the same parameter objects as `old`, as after `convert_sync_batchnorm`."""
    new_adapters, old_adapters = new._modules.get(RESERVED), old._modules.get(RESERVED)
    parameters = {**old._parameters}
    same_parameters = all(new._parameters.get(name) is parameter for name, parameter in parameters.items())
    recognisable = old_adapters is not None or (isinstance(old, _BATCH_NORM) and isinstance(new, _BATCH_NORM))
    return (
        site_state(new) is None
        and new_adapters is old_adapters
        and same_parameters
        and bool(parameters)
        and recognisable
    )


def move_record(state: ModelState, old: nn.Module, new: nn.Module, journal: Journal) -> None:
    """Make `new` the site of a record. The rules' rewrites are recorded again when `new` gets its class."""
    site = site_state(old)
    assert site is not None
    for module in (old, new):
        keep_site(journal, module)
    for applied in site.applied:
        journal.keep(applied.__dict__)
    journal.keep(*[places.modules for places in state.places.values()], state.moving)
    journal.attribute(state, "links")
    swap_class(old, site.base)
    del old.__dict__[_SITE]
    new.__dict__[_SITE] = site
    site.base, site.woven = type(new), None
    for applied in site.applied:
        applied.layer = None
    _replace(state, old, new)


def _replace(state: ModelState, old: nn.Module, new: nn.Module) -> None:
    for modules in (*[places.modules for places in state.places.values()], state.moving):
        modules[:] = [new if module is old else module for module in modules]
    state.links = None


# Batch norms, which users convert after everything else is set up ----------------------------------------------


class BatchNormWatch:
    """A forward pre-hook of models with rules on batch norms: moves records before the new modules are called."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        state = model_state(self.model)
        if state is None or (state.links is not None and state.links.hold()):
            return
        state.links, missing = link_sites(self.model, state.sites())
        if missing:
            state.links = None
            follow(self.model, state, missing)


def watch(model: nn.Module, state: ModelState, journal: Journal) -> None:
    """Add the hook if the last applied adapter has rules on batch norms."""
    watched = any(isinstance(hook, BatchNormWatch) for hook in model._forward_pre_hooks.values())
    last = next(reversed(state.places.values())).modules if state.places else ()
    if not watched and any(isinstance(module, _BATCH_NORM) for module in last):
        journal.keep(model._forward_pre_hooks)
        model.register_forward_pre_hook(BatchNormWatch(model))


def unwatch(model: nn.Module, journal: Journal) -> None:
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, BatchNormWatch):
            journal.keep(model._forward_pre_hooks)
            del model._forward_pre_hooks[key]
