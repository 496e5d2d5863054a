"""Training of biases alone, per adapter: BitFit, PEFT's bias="all"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Any

from torch import Tensor, nn

from surgery import Combination, LiveSite, Rule, Share, Site, SlotRule, Targets, packed_weight_of, rule
from surgery.rules._shared.combining import Tensors
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

EVERYWHERE = "re:.*"
_OfAttention = nn.modules.linear.NonDynamicallyQuantizableLinear  # MultiheadAttention's out_proj, trained with it


@rule("bias")
class BiasRule(Rule):
    """Train biases, in copies that belong to the adapter; without targets, all biases of the model.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import BiasRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), [BiasRule()])
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.adapters.default.bias', '1.adapters.default.bias']

    A bias is a parameter named `bias`, `bias_…` or `…_bias`. Copies have the dtypes and shapes of the base's biases and
    start equal to them.

    Args:
        targets: modules whose biases are trained; default all modules that have one. Modules whose biases another rule
            of the adapter trains already, such as a TrainRule, are left out.

    Source: BitFit, Ben Zaken et al. 2022, arXiv:2106.10199; PEFT's LoraConfig.bias = "all".
    """

    targets: Targets = field(default=EVERYWHERE, kw_only=False)
    identity = True

    def expand(self, module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
        return [(path, module)] if self.targets != (EVERYWHERE,) or trains_biases(module) else []

    def check(self, module: nn.Module, path: str) -> str | None:
        if biases(module):
            return None
        packed = packed_weight_of(module)
        if packed is not None and packed.bias is not None:
            return "its bias is not a parameter; LoraRule(lora_bias=True) trains one"
        return "it has no bias"

    def covered_by(self, other: Any, module: nn.Module) -> bool:
        """A rule that trains the whole module trains its biases, and so does another BiasRule."""
        if not biases(module):
            return False
        whole = trains_whole(other) or (self.targets == (EVERYWHERE,) and other.exclusive)
        return whole or isinstance(other, BiasRule)

    def rewrite(self, site: Site) -> None:
        replace_all(site, self.trained(site.module))

    def trained(self, module: nn.Module) -> list[str]:
        return biases(module)

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


class BiasesOf(BiasRule):
    """A BiasRule that skips targets without a bias: LoRA's `bias="lora_only"`."""

    name = BiasRule.name  # a file has a BiasRule in its place

    @property
    def label(self) -> str:
        return "BiasRule"

    def expand(self, module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
        return [(path, module)] if biases(module) else []


def trains_biases(module: nn.Module) -> bool:
    """Whether a BiasRule without targets goes on a module."""
    return bool(biases(module)) and not isinstance(module, _OfAttention)


def biases(module: nn.Module) -> list[str]:
    parameters = dict(module.named_parameters())
    names = [name for name, _ in own_tensors(module) if name in parameters]
    return [name for name in names if _is_bias(name.rpartition(".")[2])]


def _is_bias(name: str) -> bool:
    return name == "bias" or name.startswith("bias_") or name.endswith("_bias")
