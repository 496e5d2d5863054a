"""Merging as PEFT does it: while some adapters are merged, the others take no part in a call."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

import surgery
from surgery.errors import SurgeryWarning, abbreviate
from surgery.lifecycle.switching import weights_now
from surgery.merging.merge_settings import Quantised
from surgery.patterns.wrappers import unwrap
from surgery.rewritten_model.verb_root import rewritten
from surgery.state.records import SiteState, merged_adapters, model_state, sites
from surgery.transaction.undo_log import Journal

__all__ = ["merge_alone", "resting_adapters", "unmerge"]


def merge_alone(
    model: nn.Module, names: Sequence[str], safe: bool, quantised: Quantised = "dequantise", limit: float | None = 0.10
) -> None:
    """Merge these adapters. Other live adapters rest until `unmerge`: with PEFT, a merged layer is its weight alone.

    Quantised modules become plain Linears, because PEFT's way, which rounds the sum to codes, loses small changes.
    """
    state = rewritten(model)[1]
    before = weights_now(state)
    with Journal() as journal:
        if not before.keys() <= set(names):
            with _same_flags(model):
                surgery.activate(model, list(names))
            journal.attribute(state, "resting")
            state.resting = before
        surgery.merge(model, names, safe=safe, untie=True, quantised=quantised, limit=limit)
    _tell_of_plain(model)


def _tell_of_plain(model: nn.Module) -> None:
    plain = [path for path, _, site in sites(unwrap(model)) if _is_plain(site)]
    if plain:
        warnings.warn(
            f"The quantised modules {abbreviate(plain)} are plain Linears while the adapters are merged: PEFT rounds "
            "the sum to codes, which loses small changes. quantised='requantise' does so where little is lost",
            SurgeryWarning,
            stacklevel=5,
        )


def _is_plain(site: SiteState) -> bool:
    return site.merged is not None and site.merged.packed is not None and site.merged.packed.plain is not None


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
