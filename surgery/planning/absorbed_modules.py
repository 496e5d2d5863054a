"""Finds rules on modules whose calls a rule at another site has taken away, so that they would have no effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from surgery.authoring.planned_rule import PlannedRule
from surgery.authoring.site_facts import INLINED, UNCALLED
from surgery.errors import SiteError, SurgeryError
from surgery.state.records import sites

__all__ = ["absorbed_problems"]


def absorbed_problems(model: nn.Module, steps: Iterable[PlannedRule]) -> list[SurgeryError]:
    """Returns a problem for each planned rule on a module that a rule, planned or on the model, no longer calls."""
    steps = list(steps)
    reasons: dict[int, str] = {}
    for _, module, state in sites(model):
        for applied in state.applied:
            reasons |= _reasons(module, state.path, f"{applied.rule.label} [{applied.adapter}]", applied.facts)
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
