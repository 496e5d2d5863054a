"""Computes the new values of an adapter's tensors for a hot-swap, without touching the model."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from surgery.adapter_files.entry import Entry
from surgery.adapter_files.tensor_files import TensorFile
from surgery.authoring.hook_call import HookCall
from surgery.authoring.live_site import LiveSite
from surgery.authoring.planned_rule import PlannedRule
from surgery.authoring.rule import Rule
from surgery.complex_numbers import is_number
from surgery.errors import RuleError, SiteError, SurgeryError
from surgery.planning.plan import Plan
from surgery.storage.hotswap_plan import ROOT, AdapterSite, AdapterSites, step_for, unmerged_tensors
from surgery.weaving.rewrite_recording import layer_of

__all__ = ["NewValues", "detached_copy"]

Value = tuple[PlannedRule, str, Entry]


class NewValues:
    """Computes the new value of each tensor of the adapter, and collects problems."""

    def __init__(self, plan: Plan, live: AdapterSites, values: list[Value], file: TensorFile, finite: bool):
        self.plan, self.live, self.file, self.finite = plan, live, file, finite
        self.entries: dict[int, dict[str, Entry]] = {}
        for step, name, entry in values:
            self.entries.setdefault(id(step), {})[name] = entry
        self.problems: list[SurgeryError] = []
        self.idle: list[str] = []
        self.notes: dict[str, int] = {}
        self._checked_kinds = set[tuple[int, type]]()  # `initialise` runs once for each rule and module class

    def tensors(self) -> list[tuple[Tensor, Tensor]]:
        """Returns pairs of a tensor and its new value."""
        new_steps = {(id(step.module), type(step.rule)): step for step in self.plan.steps}
        pairs: list[tuple[Tensor, Tensor]] = []
        gpus = {t.device.index or 0 for site in self.live.values() for t in site.tensors.values() if t.is_cuda}
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=sorted(gpus)),
        ):  # most random starting values are overwritten
            for key, site in self.live.items():
                try:
                    tensors = self._new_tensors(site, new_steps.get(key))
                    pairs += [
                        (tensor, self._check_range(name, tensors[name], tensor))
                        for name, tensor in site.tensors.items()
                    ]
                except SurgeryError as error:
                    error.where = error.where or site.path or ROOT
                    self.problems.append(error)
        return pairs

    def _new_tensors(self, site: AdapterSite, step: PlannedRule | None) -> dict[str, Tensor]:
        rule = site.applied.rule
        if step is None:
            if not site.tensors:
                raise SiteError(f"the new adapter lacks {rule.label}, which has no tensors that could make it neutral")
            neutral_rule = _identity_start(rule)
            step = step_for(neutral_rule, site.path, site, self.plan.adapter)
            live = self._site(site, self._initial_tensors(step, {}))
            with HookCall(rule, "neutral", site.path):
                tensors = neutral_rule.neutral(live)
            if tensors is None:
                raise SiteError(
                    f"the new adapter lacks {rule.label}, and the rule does not say which tensors make it neutral",
                    fix="swap in an adapter with all its sites, or implement the rule's `neutral`",
                )
            self.idle.append(site.path)
            return self._check_shapes(site, tensors, rule)
        initial = self._initial_tensors(step, self.entries.get(id(step), {}))
        shapes = {name: tuple(tensor.shape) for name, tensor in site.tensors.items()}
        if _same_code(step, site) and shapes == {name: tuple(tensor.shape) for name, tensor in initial.items()}:
            return initial
        live = self._site(site, initial)
        with HookCall(step.rule, "swapped", site.path):
            tensors = step.rule.swapped(rule, live)
        for note in dict.fromkeys(live.notes):
            self.notes[note] = self.notes.get(note, 0) + 1
        return self._check_shapes(site, tensors, step.rule)

    def _initial_tensors(self, step: PlannedRule, entries: dict[str, Entry]) -> dict[str, Tensor]:
        """Returns a rule's tensors: from the file, or else as its fields initialise them."""
        rule, device = step.rule, self._device(step)
        trial_tensors = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=device) for spec in step.specs}
        for spec in step.specs:
            if spec.name in entries:
                trial_tensors[spec.name].copy_(entries[spec.name].read(self.file.read(entries[spec.name].key)))
            else:
                spec.fill(trial_tensors[spec.name])
        missing = [spec.name for spec in step.specs if spec.name not in entries]
        kind = (id(rule), type(step.module))
        if type(rule).initialise is not Rule.initialise and (missing or kind not in self._checked_kinds):
            self._checked_kinds.add(kind)
            trial = {name: tensor.clone() for name, tensor in trial_tensors.items()}
            source = unmerged_tensors(step.module, step.path)
            with HookCall(rule, "initialise", step.path):
                changes = rule.initialise(LiveSite(step.module, step.path, self.plan.adapter, trial, source))
            if changes:
                why = f"{rule.label} changes the base's weights at its start, which compiled code does not see"
                raise SiteError("these weights hold only with another base", why=why, fix="load it with load_adapter")
            trial_tensors |= {name: trial[name] for name in missing}
        return trial_tensors

    def _device(self, step: PlannedRule) -> torch.device | None:
        live = self.live[id(step.module), type(step.rule)].tensors
        return next((tensor.device for tensor in live.values()), None)

    def _site(self, site: AdapterSite, params: dict[str, Tensor]) -> LiveSite:
        return LiveSite(site.module, site.path, self.plan.adapter, params, unmerged_tensors(site.module, site.path))

    def _check_shapes(self, site: AdapterSite, tensors: Any, rule: Rule) -> dict[str, Tensor]:
        tensors = dict(tensors)
        for name, tensor in site.tensors.items():
            shape = tuple(tensors[name].shape) if name in tensors else None
            if shape != tuple(tensor.shape):
                what = (
                    f"{rule.label} has no {name} at this site"
                    if shape is None
                    else f"{rule.label}'s {name} has the shape {shape}"
                )
                why = f"the tensor in the model is {tuple(tensor.shape)}"
                raise RuleError(what, why=why, fix="load it as a separate adapter with load_adapter")
        return tensors

    def _check_range(self, name: str, new: Tensor, tensor: Tensor) -> Tensor:
        new = new.detach().to(tensor.dtype)
        if self.finite and is_number(new) and not bool(torch.isfinite(new).all()):
            raise SiteError(f"its {name} has numbers that {str(tensor.dtype).removeprefix('torch.')} can't hold")
        return new


def _same_code(step: PlannedRule, site: AdapterSite) -> bool:
    """Whether the site's code is the code that the new rule would make."""
    if step.rule.differing_fields(site.applied.rule):
        return False  # fields are saved with the adapter, even if the code does not depend on them
    return step.inside or layer_of(site.applied, site.module, site.path, step.own).tape == step.tape


def _identity_start(rule: Rule) -> Rule:
    """Returns the rule with `init="identity"`, if it accepts that."""
    if not rule.identity and any(field.name == "init" for field in fields(rule)):
        try:
            return rule.replace(init="identity")
        except SurgeryError:
            pass
    return rule


def detached_copy(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.detach().clone()
