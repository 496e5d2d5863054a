"""`LowRankMethod`: a low-rank method except for its factors. Branch, merging, combination, hot-swapping, slots."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from surgery import Combination, LiveSite, LowRank, Rule, Share, Site, SurgeryError
from surgery.rules._linear.layouts import Layout, WeightPart, layout_of
from surgery.rules._low_rank import combining, swapping
from surgery.rules._low_rank.rule import Fill, LowRankRule, TensorSource, sure
from surgery.rules._shared import complex_weights, fields
from surgery.rules.slots.low_rank import LowRankSlottable


class LowRankMethod(LowRankSlottable, LowRankRule):
    """W + scale · B A, on all modules that LoRA takes. A method has a field `rank` and defines its `factors`.

    It may have LoRA's fields `alpha`, `rslora`, `rank_pattern`, `alpha_pattern`, `dropout`, `dtype` and `max_rank` (for
    `pad_rank`), or its own `scale_at`. A method with `tensors_for` can be combined, and hot-swapped between scales.
    """

    def validate(self) -> None:
        fields.patterns(self, "rank_pattern", "alpha_pattern")
        ranks, alphas = dict(self.rank_pattern or {}), dict(self.alpha_pattern or {})
        if not all(type(value) is int and value >= 1 for value in (self.rank, *ranks.values())):
            raise self.bad("rank_pattern" if ranks else "rank", "a whole number from 1")
        if self.max_rank is not None and (
            type(self.max_rank) is not int or self.max_rank < max(self.rank, *ranks.values(), 1)
        ):
            raise self.bad("max_rank", "a whole number from the rule's ranks up, or None")
        if self.alpha is not None and not all(
            type(value) in (int, float) and 0 < value < math.inf for value in (self.alpha, *alphas.values())
        ):
            raise self.bad("alpha_pattern" if alphas else "alpha", "a number above 0")
        fields.chance(self, "dropout")
        if self.dtype not in (None, "float16", "bfloat16", "float32", "float64"):
            raise self.bad("dtype", "a floating-point dtype")

    @property
    def additive(self) -> bool:
        return True

    def matrices(self, module: nn.Module, path: str) -> Mapping[str, tuple[int, int]] | None:
        """Returns the maps of an attention, or of a grouped convolution with all groups together."""
        if not isinstance(module, nn.MultiheadAttention) and getattr(module, "groups", 1) == 1:
            return None
        layout = sure(layout_of(module, self.rank_at(path)))
        return {f"{path}.{part.weight}".strip("."): part.matrix for part in layout.parts}

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module):
            return why
        own_layout = layout_of(module, self.rank_at(path))
        layout = own_layout if self.max_rank is None else layout_of(module, self.max_rank)
        if isinstance(layout, str) or isinstance(own_layout, str):
            return str(layout)
        if own_layout.parts[0].groups != layout.parts[0].groups:
            return f"its groups divide one of rank {self.rank_at(path)} and max_rank {self.max_rank}, and not the other"
        if self.dropout and layout.weight_space and layout.kind != "embedding":  # whose indices take none
            return f"dropout={self.dropout} has no input to act on: {layout.why}; give it a rule with dropout=0"
        return None

    def review(self, paths: Sequence[str]) -> Iterable[str | SurgeryError]:
        return fields.unused_patterns(self, paths, "rank_pattern", "alpha_pattern")

    # Live -----------------------------------------------------------------------------------------------------

    def rewrite(self, site: Site) -> Tensor | None:
        layout, scale = self.layout(site), self.scale_at(site.path)
        for part, own_part in zip(layout.parts, self.used_layout(site).parts, strict=True):
            A, B = self.factors(part, self._maker(site, part, own_part))
            gain = self.gain(site, part, A, B)
            if not layout.weight_space:
                return site.output + self.branch(site, layout, A, B, gain, scale)
            weight = site.tensor(part.weight)
            changed = weight.to(A.dtype) + part.delta(A, B) * scale
            changed = changed if gain is None else changed * gain
            site.replace(weight, changed.to(weight.dtype))
            self.added_bias(site, layout, gain)
        return None

    def gain(self, site: Site, part: WeightPart, A: Tensor, B: Tensor) -> Tensor | None:
        """Returns the factor of the changed weight, one number per output feature, or None."""

    def added_bias(self, site: Site, layout: Layout, gain: Tensor | None) -> Tensor | None:
        """Returns a bias on B. None if there is none, or if it was added to the module's own bias."""

    def _maker(self, site: Site, part: WeightPart, own_part: WeightPart) -> TensorSource:
        """Returns the source that creates a part's tensors. Room for more rank is filled with zeros."""
        shapes = None if part == own_part else self.shapes(own_part)
        tied = site.module._parameters["weight"] if self.tied else None

        def make(name: str, shape: Sequence[int], fill: float | Fill = 0.0, *, trainable: bool = True) -> Tensor:
            started = fill if shapes is None else swapping.fill_room(fill, shapes[name], own_part)
            options: dict[str, Any] = {"dtype": self.dtype, "trainable": trainable, "tied": tied}
            return site.param(part.prefix + name, shape, started, **options)

        return make

    def branch(self, site: Site, layout: Layout, A: Tensor, B: Tensor, gain: Tensor | None, scale: float) -> Tensor:
        """Returns what the rule adds to the output."""
        bias = self.added_bias(site, layout, gain)
        x = layout.cast(site.input, A)
        dropping = self.dropout > 0 and layout.kind != "embedding"
        if dropping:
            x = F.dropout(x, self.dropout, site.training)  # type: ignore[arg-type]  # the flag as it is at each call
        branch = layout.up(layout.down(site, x, A), B, bias) * scale
        if gain is None:
            return branch
        gain = layout.on_output(gain)
        base = layout.base(site, x) if dropping else layout.without_bias(site)
        return (gain - 1) * base + gain * branch

    # As a change of the weights -------------------------------------------------------------------------------

    def changes(self, site: LiveSite) -> dict[str, LowRank | Tensor]:
        """Returns the change of each weight."""
        scale = self.scale_at(site.path)
        return {
            part.weight: part.low_rank(*self.factors_of(site.params, part), scale) for part in self.layout(site).parts
        }

    def merged(self, site: LiveSite) -> dict[str, LowRank | Tensor]:
        return self.changes(site)

    # In other tensors -----------------------------------------------------------------------------------------

    def padded(self, rank: int) -> Rule:
        return self.replace(max_rank=rank) if self.has_field("max_rank") else self

    def swapped(self, live: Rule, site: LiveSite) -> dict[str, Tensor]:
        return swapping.tensors(self, cast(LowRankRule, live), site)

    def neutral(self, site: LiveSite) -> Mapping[str, Tensor]:
        return site.params if self.identity else {name: tensor.zero_() for name, tensor in site.params.items()}

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, Mapping[str, Tensor]]:
        return combining.combine(shares, how)

    def united(self, rules: Mapping[str, Rule]) -> Mapping[str, Rule]:
        if not all(self.has_field(name) for name in ("alpha", "rank_pattern", "alpha_pattern")):
            return rules
        return combining.unite(cast("Mapping[str, LowRankRule]", rules))
