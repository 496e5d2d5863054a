"""Converts the rules of each site to the factors of one LoRA. Nothing on the model changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from surgery.arithmetic.exact_fold import LowRank
from surgery.authoring.live_site import LiveSite
from surgery.authoring.rule import Rule
from surgery.errors import MergeError, PlanError, SurgeryError
from surgery.forward.offloaded_weights import value_at
from surgery.forward.own_forward import own_forward
from surgery.lora_conversion.lora_factors import LoraFactors, factorise
from surgery.lora_conversion.lora_rule import lora_rule
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
        self.factors: dict[str, LoraFactors] = {}
        self.rule: Rule | None = None
        self.tensors: Mapping[str, Tensor] = {}

    @property
    def replaced(self) -> list[Applied]:
        """The rules that the LoRA stands for."""
        kept = {id(applied) for applied in self.change.kept}
        return [applied for applied in self.chosen if id(applied) not in kept]

    @property
    def rank(self) -> int:
        return max(factors.rank for factors in self.factors.values())


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
                problems += _lost_too_much(result, choice)
    if problems:
        raise PlanError(problems)
    if not any(site.factors for site in converted):
        why = "its rules hold copies of the base's tensors, or change biases alone"
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
    result = ConvertedSite(site.path, module, chosen, change)
    if change.others:
        name, label = next(iter(change.others.items()))
        why = f"{label} changes its {name}, too, and LoRA changes {', '.join(possible)} and a bias"
        raise MergeError("the site's change can't be held by LoRA", where=path, why=why, fix="keep the rule as it is")
    if not change.weights:
        return result
    live = LiveSite(module, site.path, "", {}, lambda name, _: value_at(module, name))
    for name, delta in change.weights.items():
        shape, groups = possible[name]
        values = (delta.B, delta.A) if isinstance(delta, LowRank) else (delta,)
        if not all(bool(value.isfinite().all()) for value in values):
            why = f"the change of its {name} has NaN or infinity in it"
            raise MergeError("the site's change is not finite", where=path, why=why, fix="load the adapter again")
        result.factors[name] = factorise(delta, shape, groups, choice, live.dtype)
    rank = max(result.rank, choice.rank or 1) if choice.uniform else result.rank
    changes = {name: result.factors[name].padded(rank, possible[name][1]) for name in result.factors}
    own = next(iter(changes.values()))
    for name in possible:
        if name not in changes:
            shape, groups = possible[name]
            zeros = LowRank(own.B.new_zeros(shape[0], 1), own.A.new_zeros(1, math.prod(shape[1:])))
            changes[name] = LoraFactors(zeros, 0.0, 0.0).padded(rank, groups)
    rank = max(len(low_rank.A) for low_rank in changes.values())
    result.rule, lora = lora_rule(rank, change.bias is not None)
    if why := lora.check(module, path):
        raise MergeError("the site's change can't be held by LoRA", where=path, why=why, fix="keep the rule as it is")
    bias = change.bias.to(live.dtype) if change.bias is not None else None
    result.tensors = lora.tensors_of(live, changes, bias)
    return result


def _lost_too_much(site: ConvertedSite, choice: RankChoice) -> Iterator[SurgeryError]:
    if choice.rank is None or choice.tolerance is None:
        return
    for name, factors in site.factors.items():
        if factors.error > choice.tolerance + 1e-6:
            yield SurgeryError(
                f"rank {choice.rank} loses more than the tolerance",
                where=f"{site.path}.{name}".strip("."),
                why=f"{factors.error:.2%} of the change, and the tolerance is {choice.tolerance:.2%}",
                fix="give a higher rank, a higher tolerance, or only one of the two",
            )
