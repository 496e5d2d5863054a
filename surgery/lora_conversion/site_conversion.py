"""Converts the rules of each site to the factors of one LoRA. Nothing on the model changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from surgery.arithmetic.exact_fold import LowRank, Record
from surgery.authoring.rule import Rule
from surgery.errors import MergeError, PlanError, SurgeryError
from surgery.forward.own_forward import own_forward
from surgery.lora_conversion.lora_factors import LoraFactors
from surgery.lora_conversion.lora_rule import lora_rule
from surgery.lora_conversion.lora_tensors import lora_tensors, lost_too_much
from surgery.lora_conversion.site_change import SiteChange, change_of_site
from surgery.lora_conversion.truncated_svd import RankChoice
from surgery.progress import Progress, each_step
from surgery.state.absent_values import without_values
from surgery.state.adapter_tensors import box_of
from surgery.state.records import Applied, ModelState, SiteState, sites
from surgery.weaving.class_objections import reason_against
from surgery.weaving.conflicts import find_hidden_rule, find_live_conflict

__all__ = ["ConvertedSite", "convert_sites"]


class ConvertedSite:
    """One site: its rules, its change, the factors of each weight, and the LoRA with its tensors."""

    def __init__(self, path: str, module: nn.Module, chosen: list[Applied], change: SiteChange):
        self.path, self.module, self.chosen, self.change = path, module, chosen, change
        self.factors: Mapping[str, LoraFactors] = {}
        self.rule: Rule | None = None
        self.tensors: Mapping[str, Tensor] = {}

    @property
    def replaced(self) -> list[Applied]:
        """The rules that the LoRA stands for."""
        kept = {id(applied) for applied in self.change.kept}
        return [applied for applied in self.chosen if id(applied) not in kept]


def convert_sites(
    root: nn.Module, state: ModelState, weights: Mapping[str, float], choice: RankChoice, progress: Progress
) -> list[ConvertedSite]:
    at = state.rules_at(weights)
    chosen_sites = [(path, module, site, at[id(module)]) for path, module, site in sites(root) if id(module) in at]
    problems = [problem for item in chosen_sites for problem in _objections(*item)]
    if problems:
        raise PlanError(problems)
    converted: list[ConvertedSite] = []
    with torch.no_grad(), each_step(chosen_sites, progress, "convert to LoRA") as counted_sites:
        for path, module, site, chosen in counted_sites:
            try:
                result = _convert_site(path, module, site, chosen, weights, choice)
            except SurgeryError as problem:
                problems.append(problem)
            else:
                converted.append(result)
                problems += lost_too_much(result.path, result.factors, choice)
    if problems:
        raise PlanError(problems)
    if not any(site.factors for site in converted):
        labels = dict.fromkeys(applied.rule.label for site in converted for applied in site.chosen)
        why = f"{', '.join(labels)}: they hold copies of the base's tensors, or change only biases or stacks of experts"
        raise SurgeryError("nothing is to be converted", why=why, fix="the adapter stays as it is; save it as it is")
    return converted


def _objections(path: str, module: nn.Module, site: SiteState, chosen: list[Applied]) -> Iterator[SurgeryError]:
    refusal = reason_against(module)
    if refusal is not None:
        yield SurgeryError("the site's rules can't be converted", where=path, why=refusal[0], fix=refusal[1])
        return
    for name in dict.fromkeys(applied.adapter for applied in chosen):
        if (box := box_of(module, name)) is not None and without_values(box):
            why = "its tensors came from the meta device by to_empty"
            yield MergeError(f"the adapter {name!r} has no values yet", where=path, why=why, fix="load them first")
    for applied in chosen:
        if not applied.rule.mergeable:
            why, fix = applied.rule.why_not_merged, "leave it as it is, or take the rule out of the adapter"
            yield MergeError(f"{applied.rule.label} can't be converted to LoRA", where=path, why=why, fix=fix)
            return
    if len(chosen) > 1:
        problem = find_hidden_rule(chosen, site.path, "converted together")
        problem = problem or find_live_conflict(chosen, module, site.path, own_forward(module, site.base))
        yield from [problem] if problem is not None else []


def _convert_site(
    path: str,
    module: nn.Module,
    site: SiteState,
    chosen: list[Applied],
    weights: Mapping[str, float],
    choice: RankChoice,
) -> ConvertedSite:
    possible = lora_rule()[1].weights_at(module)
    change = change_of_site(module, site, chosen, possible, lambda applied: weights[applied.adapter])
    _add_starts(path, change, chosen, possible)
    result = ConvertedSite(site.path, module, chosen, change)
    if change.others:
        name, label = next(iter(change.others.items()))
        why = f"{label} changes its {name}, too, and LoRA changes {', '.join(possible)} and a bias"
        raise MergeError("the site's change can't be held by LoRA", where=path, why=why, fix="keep the rule as it is")
    if not change.weights:
        return result
    lora = lora_tensors(site.path, module, change.weights, change.bias, choice)
    result.rule, result.tensors, result.factors = lora.rule, lora.tensors, lora.factors
    return result


def _add_starts(
    path: str, change: SiteChange, chosen: list[Applied], shapes: Mapping[str, tuple[tuple[int, ...], int]]
) -> None:
    """Add what the rules changed in the base's weights at their start: the LoRA goes on the base as it was before."""
    for applied in chosen:
        for name, record in applied.changed:
            start = record.change if isinstance(record, Record) and record.kind == "record" else None
            if start is None or name not in shapes:
                why = f"{applied.rule.label} changed the {name} at its start by a change that is not known as factors"
                raise MergeError("the site's change can't be held by LoRA", where=path, why=why, fix="keep the rule")
            present = change.weights.get(name)
            if present is None:
                change.weights[name] = start
            elif isinstance(present, LowRank) and present.groups == start.groups == 1:
                device = present.B.device
                moved = replace(start, B=start.B.to(device), A=start.A.to(device))
                change.weights[name] = LowRank.join([present, moved])
            else:
                shape = shapes[name][0]
                dense = present.delta(shape, torch.float64) if isinstance(present, LowRank) else present
                change.weights[name] = dense + start.delta(shape, torch.float64).to(dense.device, dense.dtype)
