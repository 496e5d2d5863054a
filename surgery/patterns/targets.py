"""Targets: the names, types and patterns by which a rule selects modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery.errors import RuleError, qualified_name
from surgery.packed.packed_weight import packed_weight_of
from surgery.patterns.pattern import Candidate, Pattern, Verdict

__all__ = ["Target", "Targets", "as_pattern", "normalise_targets"]

Target = str | type[nn.Module] | Pattern
Targets = Target | Iterable[Target]
"""The type of a rule's `targets` and `exclude`: a name, a class, a `Pattern`, or several of these."""


@dataclass(frozen=True)
class AllLinear(Pattern):
    """The target `"all-linear"`, as in PEFT: every linear layer except the output head.

    Linear layers are Linear, transformers' Conv1D and quantised linear layers, as in PEFT. nn.MultiheadAttention is one
    target for its four projections, because the forward of its inner `out_proj` never runs.
    """

    def verdict(self, candidate: Candidate) -> Verdict:
        module = candidate.module
        names = {qualified_name(cls) for cls in type(module).__mro__}
        if not names & _LINEAR and packed_weight_of(module) is None:
            return Verdict(False, "all-linear", f"{type(module).__name__} is not a linear layer")
        if id(module) in candidate.heads:
            return Verdict(False, "all-linear", "it is the output head")
        if isinstance(candidate.parent, nn.MultiheadAttention):
            return Verdict(False, "all-linear", "its MultiheadAttention is the target, for all four projections")
        return Verdict(True, "all-linear", f"{type(module).__name__} is a linear layer")

    def __str__(self) -> str:
        return "all-linear"


_LINEAR = frozenset(
    {
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.activation.MultiheadAttention",
        "transformers.pytorch_utils.Conv1D",
    }
)


def as_pattern(target: str | Pattern) -> Pattern:
    """Returns the pattern of one normalised target."""
    if isinstance(target, Pattern):
        return target
    return AllLinear() if target == "all-linear" else Pattern.name(target)


def normalise_targets(targets: Targets | None) -> tuple[str | Pattern, ...]:
    """Convert targets to a tuple of names and patterns: types become patterns, a single target becomes a tuple."""
    if targets is None:
        return ()
    if isinstance(targets, (str, Pattern, type)):
        targets = (targets,)
    if isinstance(targets, Mapping) or not isinstance(targets, Iterable):
        raise RuleError(
            f"targets can't be {targets!r}", fix='a name, a module type, a Pattern, "all-linear", or a list of these'
        )
    return tuple(_normalise_target(target) for target in targets)


def _normalise_target(target: Any) -> str | Pattern:
    if isinstance(target, Mapping):
        return Pattern.from_dict(target)
    if isinstance(target, str):
        return as_pattern(target) and target  # raises for an invalid regular expression
    if isinstance(target, Pattern):
        return target
    if isinstance(target, type) and issubclass(target, nn.Module):
        return Pattern.type(target)
    raise RuleError(f"{target!r} is not a target", fix='use a name, a module type, a Pattern, or "all-linear"')
