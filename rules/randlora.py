"""RandLoRA: a full-rank ΔW as a sum of random low-rank bases; only their scales are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import LiveSite, LowRank, Site, rule
from surgery.rules._linear import delta, projections
from surgery.rules._shared import complex_weights, fields
from surgery.rules.slots.low_rank import LowRankSlottable


@rule("randlora")
class RandLoraRule(LowRankSlottable):
    """y = W x + (alpha / rank) · Σ B_i Λ_i A Γ_i x over n random bases of this rank; n is large enough for full rank.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import RandLoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(32, 16)), [RandLoraRule("0", rank=4)])
    >>> {name: tuple(tensor.shape) for name, tensor in model[0].adapters.default.tensors().items()}
    {'lambda_': (4, 4), 'gamma': (4, 16), 'A': (4, 1, 16), 'B': (32, 4, 4)}

    Works on Linear, transformers' Conv1D and quantised Linears (unmerged). Let small and large be the smaller and the
    larger of in and out, and n = ceil(small / rank). `lambda_` (rank, n) and `gamma` (n, small) are trained. The bases
    `A` (rank, 1, small) and `B` (large, n, rank) are random and frozen. Each site has its own copy: B is as large
    as the weight. Sites of one size have equal bases. PEFT draws one pair of the largest size for all sites, and each
    takes a corner: `projection_shape` is that size, which sites of several sizes need to have PEFT's numbers. The bases
    are saved with the adapter, as with PEFT's save_projection=True. λ starts at zero: the output is unchanged.

    Args:
        rank: rank of a basis; default 32. PEFT: r.
        alpha: numerator of the scale; default 640. PEFT: randlora_alpha.
        dropout: probability of dropout on the branch's input while training; default 0. PEFT: randlora_dropout.
        projection_prng_key: seed that draws the bases; default 0.
        sparse: bases of −1, 0 and 1, a third of them not zero; default False.
        very_sparse: bases of −1, 0 and 1, the part 1 / √small of them not zero; default False.
        init: "identity" (default; PEFT's init_weights=True) or "random" (False): λ starts normal.
        projection_shape: (out, in) of the weight for which the bases are drawn; default None, the site's own.

    Raises:
        RuleError: a field is out of range.

    Source: Albert et al. 2025, arXiv:2502.00987; PEFT's RandLoraConfig, whose defaults these are.
    """

    rank: int = 32
    alpha: float = 640
    dropout: float = 0.0
    projection_prng_key: int = 0
    sparse: bool = False
    very_sparse: bool = False
    init: Literal["identity", "random"] = "identity"
    projection_shape: Sequence[int] | None = None

    linear = True

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init == "identity"

    def validate(self) -> None:
        fields.whole(self, "rank")
        fields.whole(self, "projection_prng_key", least=0)
        fields.numbers(self, "alpha", low=0)
        fields.chance(self, "dropout")
        fields.one_of(self, "sparse", True, False)
        fields.one_of(self, "very_sparse", True, False)
        fields.one_of(self, "init", "identity", "random")
        projections.validate(self)

    def rank_at(self, path: str) -> int:
        return self.rank

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module):
            return why
        return delta.why_no_map(module) or projections.why_too_large(self, delta.sizes(module))

    def rewrite(self, site: Site) -> Tensor:
        out, inner = delta.sizes(site)
        small, large, rank = min(out, inner), max(out, inner), self.rank
        n = math.ceil(small / rank)
        random = self.init == "random"
        rows = site.param("lambda_", (rank, n), nn.init.normal_ if random else 0.0)
        columns = site.param("gamma", (n, small), 1 / (large if random else max(n, small)))
        nothing = torch.zeros((), dtype=site.dtype)  # the bases are drawn by `initialise`
        A = site.buffer("A", nothing.expand(rank, 1, small))
        B = site.buffer("B", nothing.expand(large, n, rank))
        down, up = _factors(rows, columns, A, B, small == inner)
        x = site.input.to(A.dtype)
        if self.dropout:
            x = F.dropout(x, self.dropout, site.training)  # type: ignore[arg-type]  # the flag as it is at each call
        return site.output + F.linear(F.linear(x, down), up) * (self.alpha / rank)

    def initialise(self, site: LiveSite) -> None:
        A, B = site.params["A"], site.params["B"]
        sizes = self.projection_shape or delta.sizes(site)
        for base, whole in zip((A, B), self._bases(min(sizes), max(sizes)), strict=True):
            base.copy_(whole[tuple(slice(size) for size in base.shape)])

    def _bases(self, small: int, large: int) -> tuple[Tensor, Tensor]:
        """A and B for a weight of these sizes, drawn in PEFT's order and precision."""
        draw, n = torch.Generator().manual_seed(self.projection_prng_key), math.ceil(small / self.rank)
        shapes = (self.rank, 1, small), (large, n, self.rank)
        if self.sparse or self.very_sparse:
            part = 1 / (2 * (math.sqrt(small) if self.very_sparse else 3))
            drawn = [torch.rand(shape, generator=draw) for shape in shapes]
            bases = [(base > 1 - part).float() - (base < part).float() for base in drawn]
        else:
            shapes = [shapes[0], *[(large, 1, self.rank)] * n]
            A, *parts = (_kaiming(torch.empty(shape, dtype=torch.bfloat16), draw) for shape in shapes)
            bases = [A, torch.cat(parts, 1)]
        A, B = (base / base.std() for base in bases)
        return A, B

    def changes(self, site: LiveSite) -> dict[str, LowRank]:
        out, inner = delta.sizes(site)
        rows, columns, A, B = (site.params[name] for name in ("lambda_", "gamma", "A", "B"))
        down, up = _factors(rows, columns, A, B, min(out, inner) == inner)
        scale = self.alpha / self.rank
        return {"weight": LowRank(down.t(), up.t(), scale) if delta.turned(site) else LowRank(up, down, scale)}


def _kaiming(tensor: Tensor, draw: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=draw)


def _factors(rows: Tensor, columns: Tensor, A: Tensor, B: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
    """The factors down (n · rank, in) and up (out, n · rank); `narrow`: whether in is the smaller size."""
    small, large = (rows.unsqueeze(-1) * A * columns).flatten(0, 1), B.flatten(1)
    return (small, large) if narrow else (large.t(), small.t())
