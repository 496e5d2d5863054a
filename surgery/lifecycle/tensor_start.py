"""Once more what an adapter's tensors start with, for those that were made without memory (the meta device)."""

from __future__ import annotations

import torch
from torch import nn

from surgery.authoring.hook_call import running
from surgery.authoring.live_site import LiveSite
from surgery.errors import SiteError
from surgery.forward.own_forward import own_forward
from surgery.forward.parameter_view import tensor_at
from surgery.state.adapter_tensors import AdapterTensors, box_of
from surgery.state.records import site_state
from surgery.weaving.recording import recorded

__all__ = ["start"]


def start(module: nn.Module, box: nn.Module) -> None:
    """Give an adapter's tensors at one site the values that their rules start with."""
    site = site_state(module)
    if site is None or not isinstance(box, AdapterTensors):
        return
    applied = [one for one in site.applied if box_of(module, one.adapter) is box]
    held = box.tensors()
    for one in applied:
        if one.inside:
            raise SiteError(
                f"{one.rule.label} can't start once more",
                where=site.path,
                why="what it asks for depends on a call",
                fix="load_state_dict with its tensors, or apply rules after the model has memory",
            )
        made = recorded(one.rule, module, site.path, one.adapter, own_forward(module, site.base), facts=one.facts)
        live = LiveSite(module, site.path, one.adapter, held, lambda name, _: tensor_at(module, name))
        with torch.no_grad(), running(one.rule, "initialise", site.path):
            for spec in made.specs:
                spec.fill(held[spec.name])
            changes = one.rule.initialise(live)
        if changes:
            raise SiteError(
                f"{one.rule.label} can't start once more",
                where=site.path,
                why="its start changes the base's weights",
                fix="remove(model), and apply rules when the base has its weights",
            )
