"""The rule library's LoRA, as this package needs it. The engine does not import the rule library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

import torch
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


def lora_rule(rank: int = 1, bias: bool = False, dtype: torch.dtype | None = None) -> tuple[Rule, LoraLike]:
    """Returns a LoRA with the scale 1, without targets: as a rule, and with its further methods."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    rule = Rule.from_dict({"rule": "lora", "rank": rank, "alpha": rank, "lora_bias": bias, "dtype": name})
    return rule, cast(LoraLike, rule)
