"""Weights that are held in another form than a plain tensor: quantised by bitsandbytes, torchao and their like."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from surgery.complexes import narrow
from surgery.errors import SiteError
from surgery.state import SiteState
from surgery.tape import Ref

__all__ = ["UNPACKED", "is_packed", "packed_in", "quantised_later"]

UNPACKED = (
    "work on the base as it was before it was quantised: load that one, put the adapter on it, "
    "merge_to(model, folder), and quantise what that writes"
)


def is_packed(tensor: Tensor | None) -> bool:
    """Whether a parameter's numbers are not simply there: a subclass that packs them, integers, bytes. Not: sharded."""
    if tensor is None or hasattr(tensor, "device_mesh"):
        return False
    return type(tensor) not in (nn.Parameter, Tensor) or narrow(tensor)


def packed_in(module: nn.Module) -> str | None:
    """Which of a module's own parameters are packed, and as what; None where none is."""
    found = [(name, tensor) for name, tensor in module._parameters.items() if tensor is not None and is_packed(tensor)]
    if not found:
        return None
    names = ", ".join(name for name, _ in found)
    kind = type(found[0][1]).__name__
    return f"{names} is a {kind if kind != 'Parameter' else found[0][1].dtype}"


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
