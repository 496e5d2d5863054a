"""Finds rules on modules whose calls a rule at another site has taken away, so that they would have no effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from surgery.authoring.planned_rule import PlannedRule
from surgery.authoring.site_facts import INLINED, UNCALLED
from surgery.errors import SiteError, SurgeryError
from surgery.patterns.wrappers import submodule
from surgery.state.records import site_state

__all__ = ["absorbed_problems"]


def absorbed_problems(model: nn.Module, steps: Sequence[PlannedRule]) -> list[SurgeryError]:
    """Returns a problem for each planned rule on a module that a rule, planned or on the model, no longer calls."""
    reasons: dict[int, str] = {}
    for path in dict.fromkeys(owner for step in steps for owner in _owners(step)):
        module = submodule(model, path)
        for applied in state.applied if (state := site_state(module)) is not None else ():
            reasons |= _reasons(module, path, f"{applied.rule.label} [{applied.adapter}]", applied.facts)
    for step in steps:
        reasons |= _reasons(step.module, step.path, step.rule.label, step.facts)
    return [
        SiteError(
            f"{step.rule.label} would have no effect",
            where=step.path,
            why=reasons[id(step.module)],
            fix="exclude the module from one of the two rules, or merge this rule into the weights first",
        )
        for step in steps
        if id(step.module) in reasons
    ]


def _owners(step: PlannedRule) -> Iterator[str]:
    """The paths of the modules around a site."""
    for path in (step.path, *step.aliases):
        while path:
            path = path.rpartition(".")[0]
            yield path


def _reasons(module: nn.Module, path: str, label: str, facts: Mapping[str, Any]) -> dict[int, str]:
    where = path or "the model itself"
    inlined = {
        id(module.get_submodule(name)): f"{label} at {where} runs the module's operations without a call of it"
        for name in facts.get(INLINED, ())
    }
    uncalled = {
        id(module.get_submodule(name)): f"{label} at {where} replaces the call of the module"
        for name in facts.get(UNCALLED, ())
    }
    return {**inlined, **uncalled}
