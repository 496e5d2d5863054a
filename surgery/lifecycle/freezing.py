"""The base is frozen while an adapter trains beside it: its parameters' flags and its running statistics come back.

An adapter either freezes the base or leaves it alone (`Standing.freezes`). What the base had is noted when the first
adapter that freezes comes, and put back when the last of these goes, whichever others are on the model.
"""

from __future__ import annotations

from torch import nn

from surgery.planning.plan import Plan
from surgery.state.records import ModelState, base_parameters
from surgery.state.running_statistics import keep_statistics, restore_statistics
from surgery.transaction.gradient_flags import set_flag
from surgery.transaction.undo_log import Journal

__all__ = ["freeze_base", "thaw_base"]


def freeze_base(plan: Plan, state: ModelState, journal: Journal) -> None:
    """Freeze the base, where the plan says so. `state` knows the adapters from before alone.

    Parameters that the user has thawed since the first adapter stay so, unless the call says `freeze=True`.
    """
    if not plan.freezes:
        return
    found, first = list(base_parameters(plan.model)), not state.freezing
    if first:
        state.flags = {name: parameter.requires_grad for name, parameter in found}
        state.moving = keep_statistics(plan.model, journal)
    if first or plan.freeze:
        for _, parameter in found:
            set_flag(parameter, False, journal)


def thaw_base(model: nn.Module, state: ModelState, journal: Journal) -> None:
    """After adapters went: give the base back what was noted, where none that is left freezes it."""
    if state.freezing:
        return
    for name, parameter in base_parameters(model):
        set_flag(parameter, state.flags.get(name, parameter.requires_grad), journal)
    restore_statistics(model, state.moving, journal)
    state.flags, state.moving = {}, []
