"""Structural rules in PEFT's configurations: the other fields are about the structure that they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from surgery.authoring.rule import Rule
from surgery.authoring.structure_rule import StructureRule
from surgery.patterns.wrappers import unwrap
from surgery.peft_format.adapter_config import PeftConfig
from surgery.peft_format.methods import part_of, structure_rules
from surgery.peft_format.targets import Modules
from surgery.planning.plan import Plan
from surgery.planning.structure_plan import plan_structure
from surgery.state.records import model_state
from surgery.state.restructuring import Restructuring
from surgery.transaction.undo_log import Trial

__all__ = [
    "described_structure",
    "present_structure",
    "records_from",
    "restructured",
    "structure_fields",
    "without_present",
]


@contextmanager
def restructured(model: nn.Module, config: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block, the model has the structure of a configuration, if it does not have that already.

    Raises `SurgeryError` if the model can't have it.
    """
    rules = without_present(model, structure_rules(PeftConfig(config, Modules.of(model))))
    if not rules:
        yield
        return
    with Trial():
        plan = Plan(unwrap(model), "")
        plan_structure(plan, [rule for rule in rules if isinstance(rule, StructureRule)])
        for problem in plan.problems:
            raise problem
        yield


def without_present(model: nn.Module, rules: Sequence[Rule]) -> list[Rule]:
    """The rules without structural rules that are on the model: adapters on repeated layers share one repetition."""
    present = [record.rule for record in present_structure(model, rules)]
    return [rule for rule in rules if rule not in present]


def present_structure(model: nn.Module, rules: Sequence[Rule]) -> list[Restructuring]:
    """The records of those structural rules that are on the model."""
    state = model_state(unwrap(model))
    return [record for record in state.structure if record.rule in rules] if state is not None else []


def described_structure(model: nn.Module, config: Mapping[str, Any]) -> list[Restructuring]:
    """The records of the structure that a configuration contains."""
    return present_structure(model, structure_rules(PeftConfig(config, Modules.of(model))))


def records_from(model: nn.Module, records: Sequence[Restructuring]) -> list[Restructuring]:
    """The model's structural records from the first of these on: to undo these, they are undone together."""
    state = model_state(unwrap(model))
    return state.structure[state.structure.index(records[0]) :] if state is not None and records else []


def structure_fields(model: nn.Module, records: Sequence[Restructuring]) -> dict[str, Any]:
    """The fields of a configuration that contain the structure of these records."""
    fields: dict[str, Any] = {}
    for record in records:
        part = part_of(record.rule)
        fields |= part.write([(record.rule, [])], Modules.of(model)) if part is not None else {}
    return fields
