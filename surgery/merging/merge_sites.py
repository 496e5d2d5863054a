"""Chooses the sites and rules of a merge, and checks them before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from surgery.errors import MergeError, PlanError
from surgery.merging.merge_objections import already_merged, objections_to_merge
from surgery.merging.merge_settings import Quantised
from surgery.state.adapter_naming import adapter_names
from surgery.state.records import Applied, Merged, ModelState, Sites, SiteState, sites

__all__ = ["MergeSites", "choose_sites", "record_of"]


@dataclass(frozen=True, eq=False)
class MergeSites:
    """What a merge is about.

    Attributes:
        names: the adapters to merge.
        sites: the sites with rules of these adapters.
        rules: these rules, by the id of the site's module.
        counted: these rules and the other live rules, by the id of the site's module.
        merged: the sites that hold exactly these adapters already. Then nothing is to merge.
    """

    names: list[str]
    sites: Sites
    rules: dict[int, list[Applied]]
    counted: dict[int, list[Applied]]
    merged: Sites


def choose_sites(
    model: nn.Module, state: ModelState, adapter: str | Sequence[str] | None, quantised: Quantised
) -> MergeSites:
    """Returns the sites of a merge. Raises `PlanError` with every reason against it."""
    names = adapter_names(state, adapter)
    structural = state.structural
    if adapter is None:
        names = [name for name in names if state.standing[name].live and name not in structural]
    elif wrong := [name for name in names if name in structural]:
        raise MergeError(
            f"the adapter {wrong[0]!r} can't be merged",
            why="it changes the model's structure, and not weights",
            fix="commit(model) makes it final; merge(model) without names merges the other adapters",
        )
    live = [name for name, status in state.standing.items() if status.live]  # idle adapters have no effect
    counted = {*names, *live}
    rules, all_rules = state.rules_at(names), state.rules_at(counted)
    all_sites = list(sites(model))
    for _, module, site in all_sites:
        if id(module) not in all_rules:  # not in the model record, such as a copied layer
            all_rules[id(module)] = [applied for applied in site.applied if applied.adapter in counted]
            rules[id(module)] = [applied for applied in site.applied if applied.adapter in names]
    chosen = [(path, module, site) for path, module, site in all_sites if rules.get(id(module))]
    problems = [
        problem
        for path, module, site in chosen
        for problem in objections_to_merge(path, module, site, rules[id(module)], all_rules[id(module)], quantised)
    ]
    merged = [(path, module, site) for path, module, site in all_sites if site.merged is not None]
    if merged and all(set(record_of(site).adapters) == set(names) for _, _, site in merged):
        return MergeSites(names, chosen, rules, all_rules, merged)
    problems += [already_merged(path, record_of(site)) for path, _, site in merged][:1]
    if problems:
        raise PlanError(problems)
    return MergeSites(names, chosen, rules, all_rules, [])


def record_of(site: SiteState) -> Merged:
    """The merge record of a site that is merged."""
    assert site.merged is not None
    return site.merged
