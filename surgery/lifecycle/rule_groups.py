"""Groups the rules of several adapters by their name, and combines each group at each site."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from surgery.authoring.combination import Combination, Share, joint_dtype
from surgery.authoring.equal_rules import ByRule
from surgery.authoring.hook_call import HookCall
from surgery.authoring.live_site import LiveSite
from surgery.authoring.rule import Rule
from surgery.authoring.site_facts import MARK
from surgery.complex_numbers import is_number
from surgery.errors import SurgeryError
from surgery.forward.offloaded_weights import value_at
from surgery.lifecycle.attach import PlacedRule
from surgery.progress import Progress, each_step
from surgery.state.adapter_tensors import tensors_of
from surgery.state.merged_tensors import merged_error
from surgery.state.records import Applied, ModelState, sites

__all__ = ["RuleAtSite", "RuleGroup", "group_rules"]


@dataclass
class RuleAtSite:
    """The adapters' rules of one group at one site with their tensors, and the combined rule and tensors."""

    path: str
    module: nn.Module
    records: list[tuple[Applied, Share]]
    rule: Rule | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class RuleGroup:
    """The adapters' rules of one rule name. `companion`: all of them are companions of other rules."""

    name: str
    rules: tuple[Rule, ...]
    companion: bool
    paths: dict[str, set[str]]  # by adapter
    at_sites: list[RuleAtSite]
    problems: list[SurgeryError] = field(default_factory=list)

    def combine(self, how: Combination, progress: Progress = False) -> None:
        """Combine the rules at each site. Equal errors of several sites are noted once."""
        how, reported = replace(how, rules=self.rules), set[tuple[str, str | None]]()
        with each_step(self.at_sites, progress, f"combine {self.name}") as at_sites:
            for at_site in at_sites:
                shares = [share for _, share in at_site.records]
                try:
                    for share in shares:
                        _check_finite(share)
                    with HookCall(shares[0].rule, "combined", at_site.path):
                        at_site.rule, at_site.tensors = cast(Rule, shares[0].rule).combined(shares, how)
                except SurgeryError as error:
                    if (error.what, error.why) not in reported:
                        self.problems.append(error)
                    reported.add((error.what, error.why))

    def placements(self) -> Iterator[tuple[RuleAtSite, PlacedRule]]:
        """The combined rules with their tensors, as `attach_idle` takes them."""
        for at_site in self.at_sites:
            assert at_site.rule is not None
            first, shares = at_site.records[0][0], [share for _, share in at_site.records]
            facts = {name: copy.deepcopy(fact) for name, fact in first.facts.items() if name != MARK}
            tensors = {name: _like(name, tensor, shares) for name, tensor in at_site.tensors.items()}
            yield at_site, PlacedRule(at_site.module, at_site.rule, tensors, facts, first.inside)


def _check_finite(share: Share) -> None:
    for name, tensor in share.params.items():
        if is_number(tensor) and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise SurgeryError(
                f"the adapter {share.adapter!r} holds numbers that are not finite",
                where=share.site.path,
                why=f"{name} of its {share.rule.label} has NaN or infinity in it",
                fix="load the adapter again",
            )


def _like(name: str, tensor: Tensor, shares: Sequence[Share]) -> tuple[Tensor, bool]:
    """A copy of a tensor with the dtype, device and kind of the adapters' tensors; and whether it is a buffer."""
    adapter_tensors = [share.params[name] for share in shares if name in share.params]
    dtype = joint_dtype(adapter_tensors) if adapter_tensors else tensor.dtype
    device = adapter_tensors[0].device if adapter_tensors else tensor.device
    new = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor.detach())
    buffer = bool(adapter_tensors) and not isinstance(adapter_tensors[0], nn.Parameter)
    return (new, True) if buffer else (nn.Parameter(new, requires_grad=is_number(new)), False)


def group_rules(model: nn.Module, state: ModelState, how: Combination) -> Iterator[RuleGroup]:
    """The adapters' rules grouped by rule name, in the adapters' order, each with its sites."""
    listed = [rule for name, rules in state.adapters.items() if name in how.weights for rule in rules]
    by_kind: dict[str, dict[int, RuleAtSite]] = {rule.name: {} for rule in listed}
    records_at = {name: state.rules_at((name,)) for name in how.weights}
    for path, module, site in sites(model):
        if site.merged is not None:
            raise merged_error(path, site.merged.adapters)
        for name, weight in how.weights.items():
            tensors = tensors_of(module, name)
            for applied in records_at[name].get(id(module), ()):
                live = LiveSite(module, site.path, name, tensors, lambda key, _, module=module: value_at(module, key))
                params = {key: tensors[key] for key in applied.tensors}
                share = Share(weight, applied.rule, live, params)
                at_site = by_kind.setdefault(applied.rule.name, {}).setdefault(
                    id(module), RuleAtSite(site.path, module, [])
                )
                at_site.records.append((applied, share))
    for kind, at_sites in ((kind, at_sites) for kind, at_sites in by_kind.items() if at_sites):
        shares = [share for at_site in at_sites.values() for _, share in at_site.records]
        paths: dict[str, set[str]] = {}
        for share in shares:
            paths.setdefault(share.adapter, set()).add(share.site.path)
        distinct, named = ByRule[Rule](), ByRule[bool]()
        share_rules = [cast(Rule, share.rule) for share in shares]
        rules = {
            id(distinct_rule): distinct_rule
            for distinct_rule in (distinct.get(rule, lambda rule=rule: rule) for rule in share_rules)
        }
        for rule in listed:
            named.get(rule, lambda: True)
        companion = not any([named.get(rule, lambda: False) for rule in rules.values()])
        yield RuleGroup(kind, tuple(rules.values()), companion, paths, list(at_sites.values()))
