"""Explains errors of calls of modules that were quantised after a rule that computes with their weight was applied."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.errors import SiteError
from surgery.forward.tape_steps import Ref
from surgery.packed.packed_parameters import UNPACKED, packed_in
from surgery.state.records import SiteState

__all__ = ["late_quantisation_error"]


def late_quantisation_error(module: nn.Module, site: SiteState, error: Exception) -> SiteError | None:
    """Returns an error that explains a call's error, if a quantised weight caused it, or None."""
    packing = packed_in(module)
    if packing is None or not isinstance(error, (NotImplementedError, RuntimeError, TypeError, AttributeError)):
        return None
    live = [applied for applied in site.live() if applied.layer is not None]
    readers = [a for a in live if any(_reads(step.args) or _reads(step.kwargs) for step in a.layer.tape.steps)]  # type: ignore[union-attr]
    if not readers:
        return None
    rules = ", ".join(dict.fromkeys(f"{applied.rule.label} [{applied.adapter}]" for applied in readers))
    return SiteError(
        f"{rules} can't compute with a quantised weight",
        where=site.path or "(the model itself)",
        why=f"the rule uses the weight itself, and the module's {packing} now: it was quantised after the rule came",
        fix=f"save the adapter, remove it, and load it onto the quantised model; or {UNPACKED}",
    )


def _reads(frozen: Any) -> bool:
    """Whether an argument on a tape names a parameter of the module."""
    if isinstance(frozen, Ref):
        return frozen.kind == "state"
    return isinstance(frozen, tuple) and any(map(_reads, frozen))
