"""Freezes the base while an adapter trains, and restores its `requires_grad` flags and running statistics.

An adapter either freezes the base or does not (`Standing.freezes`). The first adapter that freezes notes the base's
flags and statistics; removing the last adapter that freezes restores them. Other adapters do not matter.
"""

from __future__ import annotations

from torch import nn

from surgery.planning.plan import Plan
from surgery.state.records import ModelState, base_parameters
from surgery.state.running_statistics import keep_statistics, restore_statistics
from surgery.transaction.gradient_flags import set_flag
from surgery.transaction.undo_log import Journal

__all__ = ["freeze_base", "thaw_base", "train_structure"]


def freeze_base(plan: Plan, state: ModelState, journal: Journal) -> None:
    """Freeze the base if the plan says so. `state` does not list the plan's adapter yet.

    Parameters that the user unfroze since the first adapter stay unfrozen, unless the call says `freeze=True`.
    """
    if not plan.freezes:
        return
    parameters, first = list(base_parameters(plan.model)), not state.freezing
    if first:
        state.flags = {name: parameter.requires_grad for name, parameter in parameters}
        state.moving = keep_statistics(plan.model, journal)
    if first or plan.freeze:
        trained = {id(tensor.whole) for record in state.structure for tensor in record.tensors if tensor.trainable}
        for _, parameter in parameters:
            if id(parameter) not in trained:
                set_flag(parameter, False, journal)


def train_structure(plan: Plan, journal: Journal) -> None:
    """Make the tensors train that the plan's structural rules made for it."""
    for record in plan.structure:
        for tensor in record.tensors:
            if tensor.trainable and isinstance(tensor.whole, nn.Parameter):
                set_flag(tensor.whole, True, journal)


def thaw_base(model: nn.Module, state: ModelState, journal: Journal) -> None:
    """After a removal: restore the base's flags and statistics, unless a remaining adapter freezes the base."""
    if state.freezing:
        return
    for name, parameter in base_parameters(model):
        set_flag(parameter, state.flags.get(name, parameter.requires_grad), journal)
    restore_statistics(model, state.moving, journal)
    state.flags, state.moving = {}, []
