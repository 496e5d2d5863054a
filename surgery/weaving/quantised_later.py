"""An error of a call whose cause is that a module was quantised after a rule came that computes with its weight."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.errors import SiteError
from surgery.forward.packed_weights import UNPACKED, packed_in
from surgery.forward.tape_steps import Ref
from surgery.state.records import SiteState

__all__ = ["quantised_later"]


def quantised_later(module: nn.Module, site: SiteState, error: Exception) -> SiteError | None:
    """What a call's error means where the site's weight was quantised after a rule came that computes with it."""
    held = packed_in(module)
    if held is None or not isinstance(error, (NotImplementedError, RuntimeError, TypeError, AttributeError)):
        return None
    live = [applied for applied in site.live() if applied.layer is not None]
    reading = [a for a in live if any(_reads(step.args) or _reads(step.kwargs) for step in a.layer.tape.steps)]  # type: ignore[union-attr]
    if not reading:
        return None
    rules = ", ".join(dict.fromkeys(f"{applied.rule.label} [{applied.adapter}]" for applied in reading))
    return SiteError(
        f"{rules} can't compute with a quantised weight",
        where=site.path or "(the model itself)",
        why=f"the rule uses the weight itself, and the module's {held} now: it was quantised after the rule came",
        fix=UNPACKED,
    )


def _reads(frozen: Any) -> bool:
    """Whether something on a tape names a parameter of the module."""
    if isinstance(frozen, Ref):
        return frozen.kind == "state"
    return isinstance(frozen, tuple) and any(map(_reads, frozen))
