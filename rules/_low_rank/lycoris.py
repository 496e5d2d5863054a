"""What LoHa and LoKr share: fields, and a ΔW that is computed in full from small tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery import LiveSite, LowRank, Rule, Site, SurgeryError
from surgery.rules._linear import maps
from surgery.rules._low_rank import swapping
from surgery.rules._shared import complex_weights, fields, path_patterns
from surgery.rules.slots.low_rank import LowRankSlottable


@dataclass(frozen=True, kw_only=True)
class DeltaRule(LowRankSlottable):
    """W + (alpha / rank) · Δ. A method defines its tensors (`shapes`) and computes Δ from them (`delta`)."""

    rank: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init: Literal["identity", "lycoris", "random"] = "identity"
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None

    rank_dropout_scale = True  # whether rank dropout keeps the mean of what it leaves

    def shapes(self, size: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the tensors for a map of this size, (out, in, *kernel)."""
        raise NotImplementedError

    def zeros(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterable[str]:
        """Returns the names of the tensors that start at zero. The others start Kaiming-uniform."""
        raise NotImplementedError

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns Δ, linear in each tensor, with the entries of the weight in the order (out, in, *kernel)."""
        raise NotImplementedError

    def halves(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns Δ as two factors of any rank r, (out, r) and (r, in/groups · kernel)."""
        raise NotImplementedError

    def validate(self) -> None:
        fields.whole(self, "rank")
        fields.positive(self, "alpha")
        fields.chance(self, "rank_dropout", "module_dropout")
        fields.flag(self, "use_effective_conv2d")
        fields.patterns(self, "rank_pattern", "alpha_pattern")
        if not all(type(rank) is int and rank >= 1 for rank in (self.rank_pattern or {}).values()):
            raise self.bad("rank_pattern", "a mapping to whole numbers from 1")
        if not all(
            type(alpha) in (int, float) and 0 < alpha < math.inf for alpha in (self.alpha_pattern or {}).values()
        ):
            raise self.bad("alpha_pattern", "a mapping to numbers above 0")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init != "random"

    @property
    def additive(self) -> bool:
        return True

    def scale_at(self, path: str) -> float:
        return path_patterns.first(self.alpha_pattern, path, self.alpha) / self.rank_at(path)

    def rank_at(self, path: str) -> int:
        return path_patterns.first(self.rank_pattern, path, self.rank)

    def review(self, paths: Sequence[str]) -> Iterable[str | SurgeryError]:
        return fields.unused_patterns(self, paths, "rank_pattern", "alpha_pattern")

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module):
            return why
        layout = maps.linear_map(module, "linear", "conv1d", "convolution")
        return layout if isinstance(layout, str) else None

    def rewrite(self, site: Site) -> Tensor | None:
        size = maps.sizes(maps.at(site))
        shapes = self.shapes(size, self.rank_at(site.path))
        zeros = () if self.init == "random" else self.zeros(shapes)
        tensors = {
            name: site.param(
                name, shape, 0.0 if name in zeros else lambda t: nn.init.kaiming_uniform_(t, a=math.sqrt(5))
            )
            for name, shape in shapes.items()
        }
        delta = self._scaled(site, tensors)
        if self.rank_dropout:
            keep = maps.keep_mask(site, delta.flatten(1)[:, :1], self.rank_dropout).view(-1, *(1,) * (len(size) - 1))
            delta = delta * (keep / keep.mean().clamp(min=1e-6) if self.rank_dropout_scale else keep)
        if self.module_dropout:
            delta = delta * maps.keep_mask(site, delta.flatten()[0], self.module_dropout)
        return maps.add(site, delta)

    def merged(self, site: LiveSite) -> dict[str, Any]:
        return maps.add_to_weight(
            site, self._scaled(site, {name: tensor.detach() for name, tensor in site.params.items()})
        )

    def room_at(self, path: str) -> int:
        return 1  # no rank belongs to only one group of a convolution

    def changes(self, site: LiveSite) -> dict[str, LowRank]:
        tensors = {name: tensor.detach() for name, tensor in site.params.items()}
        part, (left, right) = maps.at(site).parts[0], self.halves(tensors)
        most = min(len(left), right.shape[1])
        if left.shape[1] > most:
            delta, eye = left @ right, torch.eye(most, dtype=left.dtype, device=left.device)
            left, right = (delta, eye) if most == right.shape[1] else (eye, delta)
        scale = self.scale_at(site.path)
        return {part.weight: LowRank(right.t(), left.t(), scale) if part.turned else LowRank(left, right, scale)}

    def swapped(self, live: Rule, site: LiveSite) -> dict[str, Tensor]:
        assert isinstance(live, DeltaRule)
        swapping.check(self, live, "rank", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout")
        first, ratio = next(iter(site.params)), self.scale_at(site.path) / live.scale_at(site.path)
        return {**site.params, first: swapping.scale(site.params[first], ratio, site)}

    def _scaled(self, site: Site | LiveSite, tensors: Mapping[str, Tensor]) -> Tensor:
        first = next(iter(tensors))  # Δ is linear in each of its tensors, and a small one is scaled faster
        scaled = {**tensors, first: tensors[first] * self.scale_at(site.path)}
        return self.delta(scaled).reshape(maps.sizes(maps.at(site)))


def expand_core(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Multiplies a small kernel (r, r, *kernel) by a (r, out) and b (r, in): (out, in, *kernel)."""
    return torch.einsum("ij...,ip,jq->pq...", core, a, b)


def core(size: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (rank, rank, *size[2:], *(1,) * (len(size) == 3))  # PEFT gives Conv1d's a last 1


def has_kernel(size: tuple[int, ...]) -> bool:
    return math.prod(size[2:]) > 1
