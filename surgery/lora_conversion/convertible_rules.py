"""Tells whether the rules of an adapter can be converted to LoRA."""

from __future__ import annotations

from typing import Any

from surgery.authoring.rule import Rule
from surgery.authoring.structure_rule import StructureRule
from surgery.patterns.wrappers import unwrap
from surgery.state.adapter_naming import adapter_names
from surgery.state.records import ModelState, model_state

__all__ = ["changes_weights", "is_convertible"]


def changes_weights(state: ModelState, adapter: str) -> bool:
    """Whether a rule of the adapter changes weights by a known change. Raises `SurgeryError` for an unknown adapter."""
    return any(rule.mergeable and not isinstance(rule, StructureRule) for rule in _rules(state, adapter))


def is_convertible(model: Any, adapter: str) -> bool:
    """Whether every rule of an adapter can be converted."""
    state = model_state(unwrap(model))
    return state is not None and changes_weights(state, adapter) and all(r.mergeable for r in _rules(state, adapter))


def _rules(state: ModelState, adapter: str) -> list[Rule]:
    adapter_names(state, adapter)
    return [applied.rule for records in state.rules_at((adapter,)).values() for applied in records]
