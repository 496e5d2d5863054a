"""VeRA: a low-rank branch of frozen random matrices; only two vectors of scales are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import LiveSite, LowRank, Site, rule
from surgery.rules._linear import maps, projections
from surgery.rules._shared import complex_weights, fields
from surgery.rules.slots.low_rank import LowRankSlottable


@rule("vera")
class VeraRule(LowRankSlottable):
    """y = W x + b ⊙ (B (d ⊙ (A x))): A and B are random and frozen, the vectors d and b are trained.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import VeraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 6)), [VeraRule(nn.Linear, rank=4)])
    >>> [name for name, p in model.named_parameters() if p.requires_grad][:2]
    ['0.adapters.default.d', '0.adapters.default.b']
    >>> bool((model[0].adapters.default.A == model[1].adapters.default.A).all())
    True

    Works on Linear, transformers' Conv1D and quantised Linears (unmerged). `d` (rank) and `b` (out) are trained. `A`
    (rank, in) and `B` (out, rank) are buffers of each site, Kaiming-uniform, drawn from `projection_prng_key` and their
    shape alone: sites of one shape have equal matrices. PEFT draws one pair of the largest size for all sites, and each
    takes a corner: `projection_shape` is that size, which sites of several sizes need to have PEFT's numbers. They are
    saved with the adapter, as with PEFT's save_projection=True. Tensors are float32 on modules in half precision.

    Args:
        rank: rows of A; default 256. PEFT: r.
        dropout: probability of dropout on the branch's input while training; default 0. PEFT: vera_dropout.
        d_initial: starting value of d; default 0.1.
        projection_prng_key: seed that draws A and B; default 0.
        init: "identity" (default; b is zero, PEFT's init_weights=True) or "random" (False).
        projection_shape: (out, in) of the matrices of which each site takes a corner; default None, the site's own.

    Raises:
        RuleError: a field is out of range.

    Source: Kopiczko et al. 2023, arXiv:2310.11454; PEFT's VeraConfig.
    """

    rank: int = 256
    dropout: float = 0.0
    d_initial: float = 0.1
    projection_prng_key: int = 0
    init: Literal["identity", "random"] = "identity"
    projection_shape: Sequence[int] | None = None

    def validate(self) -> None:
        fields.whole(self, "rank")
        fields.whole(self, "projection_prng_key", least=0)
        fields.chance(self, "dropout")
        fields.one_of(self, "init", "identity", "random")
        projections.validate(self)
        if type(self.d_initial) not in (int, float) or not math.isfinite(self.d_initial):
            raise self.bad("d_initial", "a number")

    @property
    def additive(self) -> bool:
        return True

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init == "identity"

    def rank_at(self, path: str) -> int:
        return self.rank

    def differing_fields(self, other: Any) -> list[str]:
        """Without `projection_shape`, which only the initial values depend on."""
        return [name for name in super().differing_fields(other) if name != "projection_shape"]

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module):
            return why
        layout = maps.linear_map(module, "linear", "conv1d")
        if isinstance(layout, str):
            return layout
        return projections.why_too_large(self, maps.sizes(layout)) or maps.why_no_dropout(layout, self.dropout)

    def rewrite(self, site: Site) -> Tensor | None:
        out, inner = maps.sizes(maps.at(site))
        random = self.init == "random"
        d = site.param("d", (self.rank,), nn.init.normal_ if random else self.d_initial)
        b = site.param("b", (out,), 1.0 if random else 0.0)
        zero = torch.zeros(
            (), dtype=site.dtype
        )  # only the shape counts: `initialise` draws, once the plan is carried out
        A, B = site.buffer("A", zero.expand(self.rank, inner)), site.buffer("B", zero.expand(out, self.rank))
        if not maps.at(site).plain:
            return maps.add(site, (b.unsqueeze(-1) * B) @ (d.unsqueeze(-1) * A), self.dropout)
        x = site.input.to(d.dtype)
        if self.dropout:
            x = F.dropout(x, self.dropout, site.training)  # type: ignore[arg-type]  # the flag as it is at each call
        return site.output + F.linear(F.linear(x, A) * d, B) * b

    def initialise(self, site: LiveSite) -> None:
        draw = torch.Generator().manual_seed(self.projection_prng_key)
        A, B = site.params["A"], site.params["B"]
        out, inner = self.projection_shape or (len(B), A.shape[1])
        for tensor, shape in ((A, (self.rank, inner)), (B, (out, self.rank))):
            bound = math.sqrt(6 / shape[1])  # Kaiming-uniform for ReLU, on the fan-in: PEFT's
            whole = torch.empty(shape).uniform_(-bound, bound, generator=draw)
            tensor.copy_(whole[: tensor.shape[0], : tensor.shape[1]])

    def merged(self, site: LiveSite) -> dict[str, LowRank]:
        d, b, A, B = (site.params[name].detach() for name in ("d", "b", "A", "B"))
        down, up = d.unsqueeze(-1) * A, b.unsqueeze(-1) * B
        turned = maps.at(site).parts[0].turned
        return {"weight": LowRank(down.t(), up.t()) if turned else LowRank(up, down)}
