"""MiSS: one small matrix that multiplies every piece of the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import Combination, LiveSite, LowRank, Rule, Share, Site, rule
from surgery.rules._linear import maps
from surgery.rules._linear.forward_maps import why_unreadable
from surgery.rules._shared import combining, complex_weights, fields
from surgery.rules.slots.low_rank import LowRankSlottable


@rule("miss")
class MissRule(LowRankSlottable):
    """y = W x + Dᵀ (x₁ + x₂ + …): x is cut into pieces x₁, x₂, … of `rank` numbers, and D is one trained matrix.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import MissRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 6)), [MissRule("0", rank=4)])
    >>> model[0].adapters.default.block.shape
    torch.Size([4, 6])

    Works on Linear, transformers' Conv1D and quantised Linears (unmerged). `block` is float32 on modules in half
    precision.

    Args:
        rank: size of a piece; default 64. PEFT: r.
        mini_r: columns of `block` in "mini"; default 1.
        dropout: probability of dropout on the branch's input while training; default 0. "bat" has no branch.
            PEFT: miss_dropout.
        variant: "miss" (default): `block` is (rank, out). "mini": `block` is (rank, mini_r) and is repeated out /
            mini_r times. "bat": `block` is (out / rank, rank, rank), and each (rank, rank) of the weight becomes W + W
            D + D. PEFT: init_weights (True is "miss").
        init: "identity" (default) or "random" (PEFT's init_weights=False).

    Raises:
        RuleError: a field is out of range.

    Source: Kang & Yin 2024, arXiv:2409.15371; PEFT's MissConfig.
    """

    rank: int = 64
    mini_r: int = 1
    dropout: float = 0.0
    variant: Literal["miss", "mini", "bat"] = "miss"
    init: Literal["identity", "random"] = "identity"

    def validate(self) -> None:
        fields.whole(self, "rank", "mini_r")
        fields.chance(self, "dropout")
        fields.one_of(self, "variant", "miss", "mini", "bat")
        fields.one_of(self, "init", "identity", "random")
        if self.variant == "bat" and self.dropout:
            raise self.bad("dropout", "0, and variant='bat' has no branch whose input it could act on")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init == "identity"

    @property
    def additive(self) -> bool:
        return self.variant != "bat"

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module):
            return why
        layout = maps.linear_map(module, "linear", "conv1d")
        if isinstance(layout, str):
            return layout
        (out, inner), bat = maps.sizes(layout), self.variant == "bat"
        if self.rank > inner or (bat and (inner % self.rank or out % self.rank)):
            return f"pieces of rank={self.rank} can't be cut out of its {out} outputs and {inner} inputs"
        if self.variant == "mini" and out % self.mini_r:
            return f"mini_r={self.mini_r} does not divide its {out} outputs"
        if bat and (why := why_unreadable(module, "variant='bat' multiplies the weight")):
            return why
        return maps.why_no_dropout(layout, self.dropout)

    def rewrite(self, site: Site) -> Tensor | None:
        out, r = site.out_features, self.rank
        shape = {"miss": (r, out), "mini": (r, self.mini_r), "bat": (out // r, r, r)}[self.variant]
        random = self.init == "random"
        block = site.param("block", shape, (lambda t: nn.init.kaiming_uniform_(t, a=math.sqrt(5))) if random else 0.0)
        if self.variant == "bat":
            site.replace(site.weight, self._bat(site, site.weight, block))
            return None
        inner = maps.sizes(maps.at(site))[1]
        if not maps.at(site).plain:
            return maps.add(site, self._whole(block, out).t().repeat(1, -(-inner // r))[:, :inner], self.dropout)
        x = F.pad(site.input.to(block.dtype), (0, -inner % r))
        if self.dropout:
            x = F.dropout(x, self.dropout, site.training)  # type: ignore[arg-type]  # the flag as it is at each call
        return site.output + x.unflatten(-1, (-1, r)).sum(-2) @ self._whole(block, out)

    def merged(self, site: LiveSite) -> dict[str, Tensor | LowRank]:
        block, layout = site.params["block"].detach(), maps.at(site)
        if self.variant == "bat":
            return {"weight": self._bat(site, site.weight, block)}
        out, inner = maps.sizes(layout)
        pieces = torch.eye(self.rank, dtype=block.dtype, device=block.device).repeat(1, -(-inner // self.rank))[
            :, :inner
        ]
        whole = self._whole(block, out)
        return {"weight": LowRank(pieces.t(), whole) if layout.parts[0].turned else LowRank(whole.t(), pieces)}

    @property
    def slot_kind(self) -> str | None:  # type: ignore[override]
        return None if self.variant == "bat" else "lora"

    why_no_slot = "variant='bat' multiplies the weight by its tensors"

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, combining.Tensors]:
        if self.variant == "bat" and not how.untouched(shares):
            raise how.refusal(shares, "variant='bat' multiplies the weight by its tensors")
        return combining.linear_in_tensors(self, shares, how)

    def _whole(self, block: Tensor, out: int) -> Tensor:
        return block.repeat(1, out // self.mini_r) if self.variant == "mini" else block

    def _bat(self, site: Site | LiveSite, weight: Tensor, block: Tensor) -> Tensor:
        layout = maps.at(site)
        rows = maps.rows_of(layout, weight).to(block.dtype)
        out, inner = maps.sizes(layout)
        pieces = rows.reshape(out // self.rank, self.rank, inner // self.rank, self.rank).transpose(1, 2)
        pieces = pieces + pieces @ block.unsqueeze(1) + block.unsqueeze(1)
        return maps.from_rows(layout, pieces.transpose(1, 2).reshape(out, inner)).to(weight.dtype)
