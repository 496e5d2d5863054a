"""BOFT: orthogonal fine-tuning by a product of butterfly factors, each with small blocks."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from surgery import LiveSite, Rule, Site, rule
from surgery.rules._linear import maps
from surgery.rules._linear.forward_maps import why_unreadable
from surgery.rules._shared import complex_weights, fields
from surgery.rules._shared.solving import cayley


@rule("boft")
class BoftRule(Rule):
    """W becomes s ⊙ (W Mᵀ), M = M_m … M_1: each M_i permutes features, rotates them block by block, and permutes back.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import BoftRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(16, 6)), [BoftRule("0", block_size=4, n_butterfly_factor=2)])
    >>> {name: tuple(p.shape) for name, p in model[0].adapters.default.named_parameters()}
    {'R': (2, 4, 4, 4), 's': (6, 1)}

    A block is the Cayley transform (I - Q) (I + Q)⁻¹ of Q = (R - Rᵀ) / 2. Factor i pairs features that are 2ⁱ half
    blocks apart, so m factors reach as far as blocks 2ᵐ⁻¹ times as large. Works on Linear, transformers' Conv1D and
    Conv1d/2d/3d, and edits the weight. Tensors: `R` (n_butterfly_factor, blocks, block_size, block_size) and `s` (out,
    1), both float32 on modules in half precision.

    Args:
        block_size: rows of a block; default 4. PEFT: boft_block_size.
        blocks: number of blocks; default 0. Set one of `block_size` and `blocks`, and the other to 0.
            PEFT: boft_block_num.
        n_butterfly_factor: number of factors; default 1. PEFT: boft_n_butterfly_factor, which PEFT sets to 1 where its
            CUDA extension can't be compiled.
        dropout: probability that a block does not rotate while training; default 0. PEFT: boft_dropout, where a fixed
            number of blocks of one factor is drawn.
        init: "identity" (default; PEFT's init_weights=True) or "random" (False).

    Raises:
        RuleError: a field is out of range.

    Source: Liu et al. 2023, arXiv:2311.06243; PEFT's BOFTConfig.
    """

    block_size: int = 4
    blocks: int = 0
    n_butterfly_factor: int = 1
    dropout: float = 0.0
    init: Literal["identity", "random"] = "identity"

    def validate(self) -> None:
        fields.either(self, "block_size", "blocks")
        fields.whole(self, "n_butterfly_factor")
        fields.chance(self, "dropout")
        fields.one_of(self, "init", "identity", "random")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init == "identity"

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module):
            return why
        layout = maps.linear_map(module, "linear", "conv1d", "convolution")
        if isinstance(layout, str):
            return layout
        if why := why_unreadable(module, "it scales and turns the weight itself"):
            return why
        size = maps.block_of(layout, self.block_size, self.blocks)
        if isinstance(size, str):
            return size
        blocks = math.prod(maps.sizes(layout)[1:]) // size
        factors = self.n_butterfly_factor
        if factors > 1 and (size % 2 or factors > blocks.bit_length() or blocks % 2 ** (factors - 1)):
            return f"{self.n_butterfly_factor} butterfly factors can't be had of {blocks} blocks of {size}"
        return None

    def rewrite(self, site: Site) -> None:
        layout, random = maps.at(site), self.init == "random"
        size, blocks = self._sizes(layout)
        shape = (self.n_butterfly_factor, blocks, size, size)
        R = site.param("R", shape, partial(nn.init.normal_, std=0.1) if random else 0.0)
        s = site.param("s", (site.out_features, 1), partial(nn.init.normal_, mean=1.0, std=0.1) if random else 1.0)
        Q = 0.5 * (R - R.transpose(-1, -2))
        if self.dropout:
            Q = Q * maps.keep_mask(site, R[..., :1, :1], self.dropout)
        site.replace(site.weight, self._changed(layout, site.weight, site.apply(cayley, Q), s))

    def merged(self, site: LiveSite) -> dict[str, Tensor]:
        R, s = site.params["R"].detach(), site.params["s"].detach()
        return {"weight": self._changed(maps.at(site), site.weight, cayley(0.5 * (R - R.transpose(-1, -2))), s)}

    def _changed(self, layout: Any, weight: Tensor, rotations: Tensor, s: Tensor) -> Tensor:
        turns = rotations.transpose(-1, -2)
        rows, (size, _) = maps.rows_of(layout, weight).to(s.dtype), self._sizes(layout)
        for i in range(self.n_butterfly_factor):
            distance, half = 2**i, size // 2
            if i:
                rows = rows.unflatten(-1, (-1, 2, distance, half)).transpose(-3, -2).flatten(-4)
            rows = maps.by_block(rows, turns[i])
            if i:
                rows = rows.unflatten(-1, (-1, distance, 2, half)).transpose(-3, -2).flatten(-4)
        return maps.from_rows(layout, rows * s).to(weight.dtype)

    def _sizes(self, layout: Any) -> tuple[int, int]:
        width = math.prod(maps.sizes(layout)[1:])
        size = self.block_size or width // self.blocks
        return size, width // size
