"""Training of normalisation layers alone, per adapter: PEFT's LN tuning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Any

from torch import Tensor, nn

from surgery import Combination, LiveSite, Rule, Share, Site, SlotRule, Targets, rule
from surgery.rules._shared.combining import Tensors
from surgery.rules.bias import EVERYWHERE
from surgery.rules.train import (
    combined_all,
    copies_slot,
    copies_slotted,
    merged_all,
    names_of,
    own_tensors,
    replace_all,
    trains_whole,
)


@rule("norm")
class NormRule(Rule):
    """Train normalisation layers, in copies that belong to the adapter; without targets, all of them.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import NormRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), [NormRule()])
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['1.adapters.default.weight', '1.adapters.default.bias']

    A normalisation layer owns parameters, and its class has `Norm` in its name. A target that is named may be any other
    layer without layers inside, as in PEFT. The adapter has its own running
    statistics of a BatchNorm, so training does not move the base's. Copies have the dtypes and shapes of the base's
    tensors.

    Args:
        targets: modules to train; default all normalisation layers.

    Source: Zhao et al. 2023, arXiv:2312.11420; PEFT's LNTuningConfig.
    """

    targets: Targets = field(default=EVERYWHERE, kw_only=False)
    identity = True
    exclusive = True

    def expand(self, module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
        chosen = self.targets != (EVERYWHERE,) or is_norm(module)
        return [(path, module)] if chosen else []

    def check(self, module: nn.Module, path: str) -> str | None:
        plain = self.targets != (EVERYWHERE,) and not _inner(module) and bool(dict(own_tensors(module)))
        return None if plain or is_norm(module) else "it is not a layer with parameters of its own and none inside"

    def covered_by(self, other: Any, module: nn.Module) -> bool:
        """A rule that trains the whole layer; without targets, any rule that takes the whole layer."""
        return trains_whole(other) or (self.targets == (EVERYWHERE,) and other.exclusive)

    def rewrite(self, site: Site) -> None:
        replace_all(site)

    def merged(self, site: LiveSite) -> dict[str, Tensor]:
        return merged_all(site)

    slot_kind = "train"

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> SlotRule | None:
        return copies_slot([name for rule in rules for name in names_of(rule, module)], module)

    def slotted(self, slot: Rule, site: LiveSite) -> dict[str, Tensor]:
        return copies_slotted(slot, site)

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, Tensors]:
        return combined_all(self, shares, how)


def is_norm(module: nn.Module) -> bool:
    named = any("Norm" in cls.__name__ for cls in type(module).__mro__)
    return named and not _inner(module) and bool(dict(own_tensors(module)))


def _inner(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_children() if name != "adapters"]
