"""The rule library's LoRA, as this package needs it. The engine does not import the rule library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

from torch import Tensor, nn

from surgery.arithmetic.exact_fold import LowRank
from surgery.authoring.live_site import LiveSite
from surgery.authoring.rule import Rule

__all__ = ["LoraLike", "lora_rule"]


class LoraLike(Protocol):
    """What `LoraRule` offers."""

    def check(self, module: nn.Module, path: str) -> str | None: ...

    def weights_at(self, module: nn.Module) -> dict[str, tuple[tuple[int, ...], int]]: ...

    def tensors_of(
        self, site: LiveSite, changes: Mapping[str, LowRank], bias: Tensor | None = None
    ) -> dict[str, Tensor]: ...


def lora_rule(rank: int = 1, bias: bool = False, targets: Any = ()) -> tuple[Rule, LoraLike]:
    """Returns a LoRA with the scale 1: as a rule, and with its further methods."""
    data = {"rule": "lora", "rank": rank, "alpha": rank, "lora_bias": bias}
    rule = Rule.from_dict({**data, "targets": targets} if targets else data)
    return rule, cast(LoraLike, rule)
