"""What is to stand in an adapter's tensors after a hot-swap, worked out beside the model; and the way into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery.adapter_files.entry import Entry
from surgery.adapter_files.tensor_files import TensorFile
from surgery.authoring.hook_call import HookCall
from surgery.authoring.live_site import LiveSite
from surgery.authoring.planned_rule import PlannedRule
from surgery.authoring.rule import Rule
from surgery.authoring.site import ParamSpec
from surgery.complex_numbers import is_number
from surgery.errors import MatchError, RuleError, SiteError, SurgeryError
from surgery.forward.own_forward import own_forward
from surgery.forward.parameter_view import tensor_at
from surgery.planning.matching import Match, Tree, matches
from surgery.planning.plan import Plan
from surgery.planning.planner import with_companions
from surgery.state.adapter_naming import adapter_names
from surgery.state.adapter_tensors import tensors_of
from surgery.state.records import Applied, ModelState, site_state, sites
from surgery.weaving.rewrite_recording import SkippedSite, layer_of, record_rewrite

__all__ = ["Living", "Making", "incoming", "living", "placed", "step_for"]

Value = tuple[PlannedRule, str, Entry]
ROOT = "(the model itself)"


class Living(NamedTuple):
    """A rule of the adapter at a site, and its own tensors."""

    path: str
    module: nn.Module
    applied: Applied
    tensors: dict[str, Tensor]


Lives = dict[tuple[int, type[Rule]], Living]  # an adapter has one rule of a kind at a site


def living(model: nn.Module, state: ModelState, adapter: str) -> Lives:
    """The adapter's rules at its sites. `SurgeryError` where its tensors are not all that there is to it."""
    if not isinstance(adapter, str):
        raise SurgeryError(f"{adapter!r} is not the name of an adapter", fix="one adapter is changed at a time")
    adapter_names(state, adapter)
    live_sites: Lives = {}
    at = state.rules_at((adapter,))
    for path, module, site in sites(model):
        rules = at.get(id(module), [])
        if rules and site.merged is not None:
            why = f"its weights hold {', '.join(site.merged.adapters)}"
            raise SurgeryError("the model is merged", where=path or ROOT, why=why, fix="unmerge(model) first")
        tensors = tensors_of(module, adapter)
        for applied in rules:
            if applied.changed:
                raise SurgeryError(
                    f"nothing else can take the place of the adapter {adapter!r}",
                    where=path or ROOT,
                    why=f"{applied.rule.label} changed the base's weights at its start, which hold only with it",
                    fix="remove it and load the other",
                )
            own = {name: tensors[name] for name in applied.tensors if name in tensors}
            live_sites[id(module), type(applied.rule)] = Living(path, module, applied, own)
    return live_sites


# What comes in ------------------------------------------------------------------------------------------------


def incoming(model: nn.Module, rules: list[Rule], adapter: str, live: Lives) -> tuple[Plan, list[SurgeryError]]:
    """New rules, each at the sites of a rule of its kind that is there, with the tensors that they ask for.

    Beside the plan what is wrong if the new adapter has tensors that are not in it: its rules match sites at which
    there is none of their kind, and perhaps, as a prefix at a cross-attention, they have nothing to do there.
    """
    plan, taken, doubtful = Plan(model, adapter), set[tuple[int, type[Rule]]](), list[SurgeryError]()
    if not rules:
        return plan, doubtful
    for rule, match in placed(Tree.of(model), rules, plan.problems):
        key = (id(match.module), type(rule))
        path = match.path or ROOT
        if key not in live or key in taken:
            has = "has one of them already" if key in taken else "has none"
            why, fix = f"at this {_kind(match.module)} the adapter {adapter!r} {has}", "load it by load_adapter"
            problem = SiteError(f"there is no place for a {rule.label}", where=path, why=why, fix=fix)
            goes = key in taken or _goes(rule, match, adapter)
            if goes:
                plan.problems.append(problem)
            elif goes is None:
                doubtful.append(problem)
            continue
        taken.add(key)
        try:
            plan.steps.append(step_for(rule, match.path, live[key], adapter))
        except SkippedSite:
            continue
        except SurgeryError as error:
            error.where = error.where or path
            plan.problems.append(error)
    return plan, doubtful


def _goes(rule: Rule, match: Match, adapter: str) -> bool | None:
    """Whether a rule has something to do at a site; None where only an example call could tell."""
    state = site_state(match.module)
    try:
        own = own_forward(match.module, state.base if state is not None else type(match.module))
        record_rewrite(rule, match.module, match.path, adapter, own)
    except SkippedSite:
        return False
    except SurgeryError:
        return None
    return True


def placed(tree: Tree, rules: list[Rule], problems: list[SurgeryError]) -> Iterator[tuple[Rule, Match]]:
    for rule, may_miss in with_companions(rules):
        seen: dict[int, Match] = {}
        try:
            for match in matches(tree, rule):
                with HookCall(rule, "expand", match.path):
                    for path, module in rule.expand(match.module, match.path):
                        seen.setdefault(id(module), Match(path, module))
        except MatchError as error:
            problems += [] if may_miss else [error]
            continue
        except SurgeryError as error:
            problems.append(error)
            continue
        problems += [RuleError(f"{rule.label}: {why}") for why in rule.review([m.path for m in seen.values()])]
        for match in seen.values():
            yield rule, match


def step_for(rule: Rule, path: str, live: Living, adapter: str) -> PlannedRule:
    """A rule in the place of one that is there: with the facts found then, and so without an example call."""
    module, applied = live.module, live.applied
    with HookCall(rule, "check", path):
        why = rule.check(module, path)
    if why:
        raise SiteError(f"{rule.label} can't go on this {_kind(module)}", where=path or ROOT, why=why)
    state = site_state(module)
    assert state is not None
    own, facts = own_forward(module, state.base), dict(applied.facts)
    if applied.inside:  # recorded for each kind of call: equal fields ask for equal tensors
        specs = tuple(_spec(name, tensor) for name, tensor in live.tensors.items())
        return PlannedRule(rule, path, module, (), own, layer_of(applied, module, path, own).tape, specs, True, facts)
    recording = record_rewrite(rule, module, path, adapter, own, facts=facts)
    return PlannedRule(rule, path, module, (), own, recording.tape, recording.specs, False, facts)


def _spec(name: str, tensor: Tensor) -> ParamSpec:
    def fill(_: Tensor) -> None:
        raise SiteError(f"how {name!r} starts is known only when its rule is applied", fix="swap in tensors for all")

    return ParamSpec(name, tuple(tensor.shape), tensor.dtype, fill, True, not isinstance(tensor, nn.Parameter))


def _kind(module: nn.Module) -> str:
    return type(module).__name__


# What will stand in the tensors -------------------------------------------------------------------------------


class Making:
    """The new content of each live tensor; what can't be had is among `problems`."""

    def __init__(self, plan: Plan, live: Lives, values: list[Value], file: TensorFile, finite: bool):
        self.plan, self.live, self.file, self.finite = plan, live, file, finite
        self.entries: dict[int, dict[str, Entry]] = {}
        for step, name, entry in values:
            self.entries.setdefault(id(step), {})[name] = entry
        self.problems: list[SurgeryError] = []
        self.idle: list[str] = []
        self.notes: dict[str, int] = {}
        self._asked = set[tuple[int, type]]()  # whether a rule changes the base is asked once for a kind of module

    def tensors(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a live tensor and what is to stand in it."""
        coming = {(id(step.module), type(step.rule)): step for step in self.plan.steps}
        pairs: list[tuple[Tensor, Tensor]] = []
        gpus = {t.device.index or 0 for site in self.live.values() for t in site.tensors.values() if t.is_cuda}
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(gpus)):  # what is drawn here is mostly overwritten
            for key, site in self.live.items():
                try:
                    tensors = self._at(site, coming.get(key))
                    pairs += [
                        (tensor, self._check_range(name, tensors[name], tensor))
                        for name, tensor in site.tensors.items()
                    ]
                except SurgeryError as error:
                    error.where = error.where or site.path or ROOT
                    self.problems.append(error)
        return pairs

    def _at(self, site: Living, step: PlannedRule | None) -> dict[str, Tensor]:
        rule = site.applied.rule
        if step is None:
            if not site.tensors:
                raise SiteError(f"nothing came for {rule.label}, which is in the code with no tensors to still it by")
            rest = _at_rest(rule)
            step = step_for(rest, site.path, site, self.plan.adapter)
            live = self._site(site, self._started(step, {}))
            with HookCall(rule, "neutral", site.path):
                tensors = rest.neutral(live)
            if tensors is None:
                raise SiteError(
                    f"nothing came for {rule.label}, and no tensors are known with which it does nothing",
                    fix="swap in an adapter that is on all its sites, or write the rule's `neutral`",
                )
            self.idle.append(site.path)
            return self._checked(site, tensors, rule)
        started = self._started(step, self.entries.get(id(step), {}))
        shapes = {name: tuple(tensor.shape) for name, tensor in site.tensors.items()}
        if _same_code(step, site) and shapes == {name: tuple(tensor.shape) for name, tensor in started.items()}:
            return started
        live = self._site(site, started)
        with HookCall(step.rule, "swapped", site.path):
            tensors = step.rule.swapped(rule, live)
        for note in dict.fromkeys(live.notes):
            self.notes[note] = self.notes.get(note, 0) + 1
        return self._checked(site, tensors, step.rule)

    def _started(self, step: PlannedRule, entries: dict[str, Entry]) -> dict[str, Tensor]:
        """A rule's tensors as the file has them, others as they follow from its fields."""
        rule, device = step.rule, self._device(step)
        trial_tensors = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=device) for spec in step.specs}
        for spec in step.specs:
            if spec.name in entries:
                trial_tensors[spec.name].copy_(entries[spec.name].read(self.file.read(entries[spec.name].key)))
            else:
                spec.fill(trial_tensors[spec.name])
        lacking = [spec.name for spec in step.specs if spec.name not in entries]
        kind = (id(rule), type(step.module))
        if type(rule).initialise is not Rule.initialise and (lacking or kind not in self._asked):
            self._asked.add(kind)
            trial = {name: tensor.clone() for name, tensor in trial_tensors.items()}
            with HookCall(rule, "initialise", step.path):
                changes = rule.initialise(LiveSite(step.module, step.path, self.plan.adapter, trial, _tensor(step)))
            if changes:
                why = f"{rule.label} changes the base's weights at its start, which compiled code would not see"
                raise SiteError("these weights hold only with another base", why=why, fix="load it with load_adapter")
            trial_tensors |= {name: trial[name] for name in lacking}
        return trial_tensors

    def _device(self, step: PlannedRule) -> torch.device | None:
        live = self.live[id(step.module), type(step.rule)].tensors
        return next((tensor.device for tensor in live.values()), None)

    def _site(self, site: Living, params: dict[str, Tensor]) -> LiveSite:
        source: Callable[[str, bool], Tensor] = lambda name, _: tensor_at(site.module, name)  # noqa: E731
        return LiveSite(site.module, site.path, self.plan.adapter, params, source)

    def _checked(self, site: Living, tensors: Any, rule: Rule) -> dict[str, Tensor]:
        tensors = dict(tensors)
        for name, tensor in site.tensors.items():
            shape = tuple(tensors[name].shape) if name in tensors else None
            if shape != tuple(tensor.shape):
                what = f"{rule.label} has no {name} here" if shape is None else f"{rule.label}'s {name} is {shape} here"
                why = f"the tensor in the model is {tuple(tensor.shape)}"
                raise RuleError(what, why=why, fix="load it as an adapter of its own: load_adapter")
        return tensors

    def _check_range(self, name: str, new: Tensor, tensor: Tensor) -> Tensor:
        new = new.detach().to(tensor.dtype)
        if self.finite and is_number(new) and not bool(torch.isfinite(new).all()):
            raise SiteError(f"its {name} has numbers that {str(tensor.dtype).removeprefix('torch.')} can't hold")
        return new


def _tensor(step: PlannedRule) -> Callable[[str, bool], Tensor]:
    return lambda name, _: tensor_at(step.module, name)


def _same_code(step: PlannedRule, site: Living) -> bool:
    """Whether the code that runs at a site is what a rule would make there."""
    if step.rule.differing_fields(site.applied.rule):
        return False  # what a field says is saved with the adapter, whether or not it is in the code
    return step.inside or layer_of(site.applied, site.module, site.path, step.own).tape == step.tape


def _at_rest(rule: Rule) -> Rule:
    """The rule as it starts without changing the output, where one of its starts is called so."""
    if not rule.identity and any(field.name == "init" for field in fields(rule)):
        try:
            return rule.replace(init="identity")
        except SurgeryError:
            pass
    return rule


# Into the tensors ---------------------------------------------------------------------------------------------


def copied(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.detach().clone()
