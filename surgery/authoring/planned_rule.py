"""One rule at one site: what planning hands over to the insertion."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.authoring.declared_tensors import ParamSpec
from surgery.authoring.match_effects import ReplacedMatch
from surgery.authoring.rule import Rule
from surgery.forward.own_forward import OwnForward
from surgery.forward.tape import Tape

__all__ = ["PlannedRule"]


@dataclass(frozen=True)
class PlannedRule:
    """One rule at one site: its edits and the tensors it asks for."""

    rule: Rule
    path: str
    module: nn.Module
    aliases: tuple[str, ...]
    own: OwnForward
    tape: Tape
    specs: tuple[ParamSpec, ...]
    inside: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    matches: tuple[ReplacedMatch, ...] = ()

    @property
    def added(self) -> int:
        return sum(math.prod(spec.shape) for spec in self.specs)

    @property
    def trainable(self) -> int:
        return sum(math.prod(spec.shape) for spec in self.specs if spec.trainable)
