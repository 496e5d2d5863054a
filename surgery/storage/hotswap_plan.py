"""Plans a hot-swap: records each new rule at the site of the adapter's rule of the same kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from surgery.authoring.declared_tensors import ParamSpec
from surgery.authoring.hook_call import HookCall
from surgery.authoring.planned_rule import PlannedRule
from surgery.authoring.rule import Rule
from surgery.errors import MatchError, RuleError, SiteError, SurgeryError
from surgery.forward.offloaded_weights import value_at
from surgery.forward.own_forward import own_forward
from surgery.planning.covered_sites import uncovered
from surgery.planning.matching import Match, Tree, matches
from surgery.planning.plan import Plan
from surgery.planning.planner import with_companions
from surgery.rewritten_model.structural_adapters import check_none_set_aside
from surgery.state.adapter_naming import adapter_names
from surgery.state.adapter_tensors import tensors_of
from surgery.state.merged_tensors import check_adapter_unmerged, merged_error
from surgery.state.records import Applied, ModelState, site_state, sites
from surgery.weaving.rewrite_recording import SkippedSite, layer_of, record_rewrite

__all__ = [
    "AdapterSite",
    "AdapterSites",
    "adapter_sites",
    "matched_sites",
    "plan_incoming_rules",
    "step_for",
    "unmerged_tensors",
]

ROOT = "(the model itself)"


class AdapterSite(NamedTuple):
    """A rule of the adapter at one site, with its tensors."""

    path: str
    module: nn.Module
    applied: Applied
    tensors: dict[str, Tensor]


AdapterSites = dict[
    tuple[int, type[Rule]], AdapterSite
]  # by module id and rule class: an adapter has at most one rule of a class at a site


def adapter_sites(model: nn.Module, state: ModelState, adapter: str) -> AdapterSites:
    """Returns the adapter's rules at its sites. Raises `SurgeryError` if new tensors can't replace the adapter."""
    if not isinstance(adapter, str):
        raise SurgeryError(f"{adapter!r} is not the name of an adapter", fix="give one adapter's name")
    adapter_names(state, adapter)
    check_adapter_unmerged(model, adapter)
    check_none_set_aside(model, state, [adapter], "be swapped or padded")
    by_kind: AdapterSites = {}
    rules_by_module = state.rules_at((adapter,))
    for path, module, _ in sites(model):
        rules = rules_by_module.get(id(module), [])
        tensors = tensors_of(module, adapter)
        for applied in rules:
            if applied.changed:
                raise SurgeryError(
                    f"the adapter {adapter!r} can't be swapped",
                    where=path or ROOT,
                    why=f"{applied.rule.label} changed the base's weights at its start, for this adapter alone",
                    fix="remove it and load the new adapter",
                )
            rule_tensors = {name: tensors[name] for name in applied.tensors if name in tensors}
            by_kind[id(module), type(applied.rule)] = AdapterSite(path, module, applied, rule_tensors)
    return by_kind


def unmerged_tensors(module: nn.Module, path: str) -> Callable[[str, bool], Tensor]:
    """Returns the source of a `LiveSite`: the module's tensors, except those that another adapter is merged into."""

    def read(name: str, before: bool) -> Tensor:
        state = site_state(module)
        if state is not None and state.merged is not None and name in state.merged.tensors:
            raise merged_error(path, state.merged.adapters)
        return value_at(module, name)

    return read


# New rules ------------------------------------------------------------------------------------------------


def plan_incoming_rules(
    model: nn.Module, rules: list[Rule], adapter: str, live: AdapterSites
) -> tuple[Plan, list[SurgeryError]]:
    """Plans each new rule at the sites of the adapter's rule of the same class.

    The second result lists problems that count only if the files have tensors outside the plan: a rule matches a site
    without a rule of its class, and only an example call could tell whether it has an effect (prefix, cross-attention).
    """
    plan, used, doubtful = Plan(model, adapter), set[tuple[int, type[Rule]]](), list[SurgeryError]()
    if not rules:
        return plan, doubtful
    for rule, match in matched_sites(Tree.of(model), rules, plan.problems):
        key = (id(match.module), type(rule))
        path = match.path or ROOT
        if key not in live or key in used:
            state = "already has such a rule" if key in used else "has no such rule"
            why, fix = f"at this {_kind(match.module)} the adapter {adapter!r} {state}", "load it with load_adapter"
            problem = SiteError(f"there is no place for a {rule.label}", where=path, why=why, fix=fix)
            has_effect = key in used or _has_effect(rule, match, adapter)
            if has_effect:
                plan.problems.append(problem)
            elif has_effect is None:
                doubtful.append(problem)
            continue
        used.add(key)
        try:
            plan.steps.append(step_for(rule, match.path, live[key], adapter))
        except SkippedSite:
            continue
        except SurgeryError as error:
            error.where = error.where or path
            plan.problems.append(error)
    return plan, doubtful


def _has_effect(rule: Rule, match: Match, adapter: str) -> bool | None:
    """Whether a rule changes anything at a site; None if only an example call could tell."""
    state = site_state(match.module)
    try:
        forward = own_forward(match.module, state.base if state is not None else type(match.module))
        record_rewrite(rule, match.module, match.path, adapter, forward)
    except SkippedSite:
        return False
    except SurgeryError:
        return None
    return True


def matched_sites(tree: Tree, rules: list[Rule], problems: list[SurgeryError]) -> Iterator[tuple[Rule, Match]]:
    """Yields each rule, and each companion, with its sites. Collects problems."""
    matched = list[tuple[Rule, list[Match]]]()
    for rule, may_miss in with_companions(rules):
        by_module: dict[int, Match] = {}
        try:
            for match in matches(tree, rule):
                with HookCall(rule, "expand", match.path):
                    for path, module in rule.expand(match.module, match.path):
                        by_module.setdefault(id(module), Match(path, module))
        except MatchError as error:
            problems += [] if may_miss else [error]
            continue
        except SurgeryError as error:
            problems.append(error)
            continue
        matched.append((rule, list(by_module.values())))
    for (rule, _), kept in zip(matched, uncovered(matched), strict=True):
        problems += [RuleError(f"{rule.label}: {why}") for why in rule.review([match.path for match in kept])]
        for match in kept:
            yield rule, match


def step_for(rule: Rule, path: str, live: AdapterSite, adapter: str) -> PlannedRule:
    """Records a new rule at the site of an applied rule, with that rule's facts, so no example call is needed."""
    module, applied = live.module, live.applied
    with HookCall(rule, "check", path):
        why = rule.check(module, path)
    if why:
        raise SiteError(f"{rule.label} can't go on this {_kind(module)}", where=path or ROOT, why=why)
    state = site_state(module)
    assert state is not None
    forward, facts = own_forward(module, state.base), dict(applied.facts)
    if applied.inside:  # recorded for each kind of call; equal fields need equal tensors
        specs = tuple(_spec(name, tensor) for name, tensor in live.tensors.items())
        return PlannedRule(
            rule, path, module, (), forward, layer_of(applied, module, path, forward).tape, specs, True, facts
        )
    recording = record_rewrite(rule, module, path, adapter, forward, facts=facts)
    return PlannedRule(rule, path, module, (), forward, recording.tape, recording.specs, False, facts)


def _spec(name: str, tensor: Tensor) -> ParamSpec:
    def fill(_: Tensor) -> None:
        raise SiteError(
            f"the initial value of {name!r} is known only when its rule is applied", fix="give values for all tensors"
        )

    return ParamSpec(name, tuple(tensor.shape), tensor.dtype, fill, True, not isinstance(tensor, nn.Parameter))


def _kind(module: nn.Module) -> str:
    return type(module).__name__
