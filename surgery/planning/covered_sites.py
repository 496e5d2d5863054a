"""Leaves sites out of a rule's matches where another rule of the same adapter does its work already."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from surgery.authoring.declaration import Declaration
from surgery.authoring.rule import Rule
from surgery.planning.matching import Match

__all__ = ["uncovered"]


def uncovered(matched: Sequence[tuple[Rule, Sequence[Match]]]) -> list[list[Match]]:
    """Returns each rule's matches without those that another of the rules covers (`Rule.covered_by`).

    If two rules cover each other at a module, the first one keeps it.
    """
    kept = [list(matches) for _, matches in matched]
    for at, (rule, matches) in enumerate(matched):
        if type(rule).covered_by is Declaration.covered_by:
            continue
        own_modules = {id(match.module) for match in matches}
        for other_at, (other, other_matches) in enumerate(matched):
            if other_at == at:
                continue
            shared = [match.module for match in other_matches if id(match.module) in own_modules]
            covered = {id(module) for module in shared if _covers(other, rule, module, first=other_at < at)}
            kept[at] = [match for match in kept[at] if id(match.module) not in covered]
    return kept


def _covers(other: Rule, rule: Rule, module: nn.Module, first: bool) -> bool:
    return rule.covered_by(other, module) and (first or not other.covered_by(rule, module))
