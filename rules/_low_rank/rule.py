"""`LowRankRule`: the attributes of a rule with scale · B A that slots, combination and hot-swapping read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor

from surgery import LiveSite, Rule, Site
from surgery.rules._linear.layouts import Layout, WeightPart, layout_of
from surgery.rules._shared import path_patterns

Fill = Callable[[Tensor], Any]


class TensorSource(Protocol):
    """Returns a rule's tensor by name: creates it while the rewrite is recorded, and reads it later."""

    def __call__(
        self, name: str, shape: Sequence[int], fill: float | Fill = 0.0, *, trainable: bool = True
    ) -> Tensor: ...


class LowRankRule(Rule):
    """The base of rules with factors A and B of a rank, in the layout of `layout_of`, and a scale.

    The attributes below are those of LoRA. A rule declares those that it has as fields; the others keep these values.
    """

    rank: int
    alpha: Any = None
    rank_pattern: Any = None
    alpha_pattern: Any = None
    max_rank: Any = None
    dtype: Any = None
    dropout: float = 0.0
    bias: Any = "none"
    rslora: bool = False
    lora_bias: bool = False
    dora: bool = False
    tied: bool = False

    def factors(self, part: WeightPart, tensor: TensorSource) -> tuple[Tensor, Tensor]:
        """Computes A and B in the shapes of `part` from tensors that `tensor(name, shape, fill)` returns.

        Each rank is independent: zeros appended to the tensors along a rank's axis append zeros to A and B.
        """
        raise NotImplementedError(f"{type(self).__name__} has no factors")

    def tensors_for(self, part: WeightPart, A: Tensor, B: Tensor) -> Mapping[str, Tensor]:
        """Returns tensors from which `factors` computes A and B: for `combine`, and a hot-swap to another scale."""
        raise NotImplementedError(f"{type(self).__name__} has no tensors_for")

    def rank_at(self, path: str) -> int:
        return int(path_patterns.first(self.rank_pattern, path, self.rank))

    def room_at(self, path: str) -> int:
        """The rank that the tensors have room for, and may use after a `hotswap`."""
        return self.max_rank or self.rank_at(path)

    def alpha_at(self, path: str) -> float:
        return path_patterns.first(self.alpha_pattern, path, self.alpha)

    def scale_at(self, path: str) -> float:
        """Returns the factor of B A: alpha / rank, or 1 for a rule without alpha."""
        if self.alpha is None:
            return 1.0
        rank = self.rank_at(path)
        return self.alpha_at(path) / (math.sqrt(rank) if self.rslora else rank)

    def layout(self, site: Site | LiveSite) -> Layout:
        """Returns the layout of A and B on the module, with all their room."""
        return sure(layout_of(site.module, self.room_at(site.path)))

    def used_layout(self, site: Site | LiveSite) -> Layout:
        """Returns the layout with room for only the rule's own rank."""
        return self.layout(site) if self.max_rank is None else sure(layout_of(site.module, self.rank_at(site.path)))

    def factors_of(self, params: Mapping[str, Tensor], part: WeightPart) -> tuple[Tensor, Tensor]:
        """Computes A and B of one part from an adapter's tensors at a site."""
        return self.factors(part, lambda name, *_, **__: params[part.prefix + name].detach())

    def shapes(self, part: WeightPart) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of a part's tensors by name, without its prefix."""
        shapes: dict[str, tuple[int, ...]] = {}

        def record(name: str, shape: Sequence[int], fill: float | Fill = 0.0, *, trainable: bool = True) -> Tensor:
            shapes[name] = tuple(shape)
            return torch.empty(shapes[name], device="meta")

        self.factors(part, record)
        return shapes

    def resized(self, rank: int, **changes: Any) -> LowRankRule:
        """Returns the rule with another rank, and with the changes that are fields of the rule."""
        changes |= {"rank": rank, "alpha": rank, "max_rank": None, "rank_pattern": None, "alpha_pattern": None}
        return self.replace(**{name: value for name, value in changes.items() if self.has_field(name)})

    def has_field(self, name: str) -> bool:
        """Whether an attribute is a field of the rule, and not the default of `LowRankRule`."""
        return any(field.name == name for field in fields(self))

    @property
    def invertible(self) -> bool:
        """Whether the rule defines `tensors_for`."""
        return type(self).tensors_for is not LowRankRule.tensors_for


def sure(layout: Layout | str) -> Layout:
    """Returns a layout that `check` has accepted."""
    assert isinstance(layout, Layout), layout
    return layout
