"""Initialises an adapter's tensors again after they moved from the meta device, where they had no memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from surgery.authoring.hook_call import HookCall
from surgery.authoring.live_site import LiveSite
from surgery.errors import SiteError
from surgery.forward.offloaded_weights import value_at
from surgery.forward.own_forward import own_forward
from surgery.state.absent_values import base_device
from surgery.state.adapter_tensors import AdapterTensors, box_of
from surgery.state.records import site_state
from surgery.weaving.rewrite_recording import record_rewrite

__all__ = ["start"]


def _realise(module: nn.Module, box: AdapterTensors) -> None:
    """Replace tensors on the meta device by memory on the device of the base's weights, if these have left it."""
    device = base_device(module)
    if device is None:
        return
    for name, tensor in box.tensors().items():
        if not tensor.is_meta:
            continue
        if isinstance(tensor, nn.Parameter):
            if tensor not in _realised:  # sites may share it
                new = torch.empty_like(tensor, device=device)
                _realised[tensor] = nn.Parameter(new, requires_grad=tensor.requires_grad)
            box._parameters[name] = _realised[tensor]
        else:
            box._buffers[name] = torch.empty_like(tensor, device=device)


_realised: Any = WeakIdKeyDictionary()  # a parameter on the meta device → what replaced it


def start(module: nn.Module, box: nn.Module) -> None:
    """Fill an adapter's tensors at one site with the initial values of its rules."""
    site = site_state(module)
    if site is None or not isinstance(box, AdapterTensors):
        return
    applied = [rule_record for rule_record in site.applied if box_of(module, rule_record.adapter) is box]
    _realise(module, box)
    tensors = box.tensors()
    for rule_record in applied:
        if rule_record.inside:
            raise SiteError(
                f"{rule_record.rule.label} can't start once more",
                where=site.path,
                why="what it asks for depends on a call",
                fix="load_state_dict with its tensors, or apply rules after the model has memory",
            )
        recording = record_rewrite(
            rule_record.rule,
            module,
            site.path,
            rule_record.adapter,
            own_forward(module, site.base),
            facts=rule_record.facts,
        )
        live = LiveSite(module, site.path, rule_record.adapter, tensors, lambda name, _: value_at(module, name))
        with torch.no_grad(), HookCall(rule_record.rule, "initialise", site.path):
            for spec in recording.specs:
                spec.fill(tensors[spec.name])
            changes = rule_record.rule.initialise(live)
        if changes:
            raise SiteError(
                f"{rule_record.rule.label} can't start once more",
                where=site.path,
                why="its start changes the base's weights",
                fix="remove(model), and apply rules when the base has its weights",
            )
