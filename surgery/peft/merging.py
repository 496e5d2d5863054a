"""Merging as PEFT does it: while some adapters are merged, the others take no part in a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

import surgery
from surgery.lifecycle.switching import weights_now
from surgery.patterns.wrappers import unwrap
from surgery.rewritten_model.verb_root import rewritten
from surgery.state.records import merged_adapters, model_state
from surgery.transaction.undo_log import Journal

__all__ = ["merge_alone", "resting_adapters", "unmerge"]


def merge_alone(model: nn.Module, names: Sequence[str], safe: bool) -> None:
    """Merge these adapters. Other live adapters rest until `unmerge`: with PEFT, a merged layer is its weight alone."""
    state = rewritten(model)[1]
    before = weights_now(state)
    with Journal() as journal:
        if not before.keys() <= set(names):
            with _same_flags(model):
                surgery.activate(model, list(names))
            journal.attribute(state, "resting")
            state.resting = before
        surgery.merge(model, names, safe=safe, untie=True)


def unmerge(model: nn.Module) -> None:
    """Unmerge all adapters, and make those live again that were so before `merge_alone`."""
    waiting = resting_adapters(model)
    with Journal():
        surgery.unmerge(model)
        if waiting:
            with _same_flags(model):
                surgery.activate(model)


@contextmanager
def _same_flags(model: nn.Module) -> Iterator[None]:
    """Keeps `requires_grad` of all parameters through a switch: PEFT's merges do not touch it."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    yield
    with Journal() as journal:
        for parameter, flag in flags:
            journal.undo(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(flag)


def resting_adapters(model: nn.Module) -> list[str]:
    """The active adapters that rest while others are merged."""
    root = unwrap(model)
    state = model_state(root)
    if state is None or not merged_adapters(root) or not weights_now(state):
        return []
    return list(state.resting)
