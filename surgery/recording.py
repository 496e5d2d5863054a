"""A rule's rewrite of one site, recorded: its edits as a tape, and the tensors it asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.errors import SiteError
from surgery.rule import Rule, running
from surgery.site import Example, ParamSpec, Site
from surgery.state import Applied
from surgery.tape import Tape, Value
from surgery.trace import Own
from surgery.weave import Layer

__all__ = ["PassedOver", "Step", "layer_of", "recorded"]


@dataclass(frozen=True)
class Step:
    """One rule at one site: its edits and the tensors it asks for."""

    rule: Rule
    path: str
    module: nn.Module
    aliases: tuple[str, ...]
    own: Own
    tape: Tape
    specs: tuple[ParamSpec, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def added(self) -> int:
        return sum(math.prod(spec.shape) for spec in self.specs)

    @property
    def trainable(self) -> int:
        return sum(math.prod(spec.shape) for spec in self.specs if spec.trainable)


class PassedOver(Exception):
    """A rule has nothing to do at a site, though its targets match it."""


def recorded(
    rule: Rule,
    module: nn.Module,
    path: str,
    adapter: str,
    own: Own,
    example: Example = None,
    owners: tuple[nn.Module, ...] = (),
    facts: dict[str, Any] | None = None,
) -> tuple[Tape, tuple[ParamSpec, ...]]:
    """A rule's rewrite of a site as a tape, and the tensors it asks for; `PassedOver` for NotImplemented.

    `facts` are those found when the rule was applied; what it finds anew is put there.
    """
    site = Site(module, path, adapter, rule.label, own, example, owners, facts)
    with running(rule, "rewrite", path):
        output = rule.rewrite(site)
    if output is NotImplemented:
        raise PassedOver
    if type(output) is not type(None):
        if not isinstance(output, (Value, tuple, list, dict)):
            raise SiteError(
                f"{rule.label}.rewrite returned {type(output).__name__}",
                where=path,
                fix="return the new output, or None",
            )
        site.replace(site.output, output)
    if not site.tape.replaced() and not any(step.kind in ("method", "around") for step in site.tape.steps):
        raise SiteError(
            f"{rule.label}.rewrite changes nothing",
            where=path,
            fix="return the new output, or use site.replace(old, new)",
        )
    return site.tape.finished(), tuple(site.specs.values())


def layer_of(applied: Applied, module: nn.Module, path: str, own: Own) -> Layer:
    """The edits of a rule that is on a site already, recorded anew where its record was copied or unpickled."""
    if applied.layer is None:
        tape, _ = recorded(applied.rule, module, path, applied.adapter, own, facts=applied.facts)
        applied.layer = Layer(applied.adapter, applied.rule.label, tape)
    return applied.layer
