"""What slots, combination and hot-swapping read of a rule that changes a map by scale · B A."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rules import _paths
from rules._layouts import Layout, layout_of
from surgery import LiveSite, Rule, Site


class LowRankRule(Rule):
    """A rule with factors A and B of a rank, laid out by `layout_of`, and a scale. Not a rule by itself."""

    rank: int
    alpha: float
    dropout: float
    bias: str
    lora_bias: bool
    rslora: bool
    dora: bool
    init: str
    rank_pattern: Mapping[str, int] | None
    alpha_pattern: Mapping[str, float] | None
    max_rank: int | None
    dtype: Any

    def rank_at(self, path: str) -> int:
        return int(_paths.first(self.rank_pattern, path, self.rank))

    def room_at(self, path: str) -> int:
        """The rank that the tensors have room for, and may use after a `hotswap`."""
        return self.max_rank or self.rank_at(path)

    def alpha_at(self, path: str) -> float:
        return _paths.first(self.alpha_pattern, path, self.alpha)

    def scale_at(self, path: str) -> float:
        rank = self.rank_at(path)
        return self.alpha_at(path) / (math.sqrt(rank) if self.rslora else rank)

    def layout(self, site: Site | LiveSite) -> Layout:
        """How A and B lie on the module, with all their room."""
        return sure(layout_of(site.module, self.room_at(site.path)))

    def used_layout(self, site: Site | LiveSite) -> Layout:
        """How they would lie with room for their own rank alone."""
        return self.layout(site) if self.max_rank is None else sure(layout_of(site.module, self.rank_at(site.path)))


def sure(layout: Layout | str) -> Layout:
    """A layout that `check` has seen to be one."""
    assert isinstance(layout, Layout), layout
    return layout
