"""A tower of attentions and MLPs, and rules that look into their forwards."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import (
    Rule,
    Structure,
    rule,
)

__all__ = [
    "Attention",
    "MASK",
    "Mlp",
    "RULES",
    "SwishOnceRule",
    "SwishRule",
    "TemperRule",
    "Tower",
    "X",
    "plainly",
    "tempered",
]


PROBABILITIES = Structure(lambda scores: torch.softmax(scores, -1))


GELU = Structure(lambda x: F.gelu(x))


@rule("test-temper")
class TemperRule(Rule):
    """A trained temperature for each head inside the softmax of an attention."""

    identity = True
    why_not_merged = "the softmax of scaled scores is no change of a weight"

    def rewrite(self, site: Any) -> Any:
        matches = site.find(PROBABILITIES)
        if not matches:
            return NotImplemented
        for weights in matches:
            scores = weights.bindings["scores"]
            site.replace(scores, scores * site.param("temper", (site.module.heads, 1, 1), 1.0))
        return None


@rule("test-swish")
class SwishRule(Rule):
    """Replaces a gelu by x · sigmoid(βx)."""

    why_not_merged = "an activation is no weight"

    def rewrite(self, site: Any) -> Any:
        for gelu in site.find(GELU):
            x = gelu.bindings["x"]
            site.replace(gelu.root, x * torch.sigmoid(x * site.param("beta", (1,), 1.702)))


class Attention(nn.Module):
    def __init__(self, width: int = 8, heads: int = 2, drop: float = 0.0):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None, temper: Any = None) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (part.view(b, n, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if cache is not None:
            k = cache.add(k)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(mask, -1e4)
        if n > 6:
            scores = scores - 1.0
        if temper is not None:
            scores = scores * temper
        return self.out((self.drop(torch.softmax(scores, -1)) @ v).transpose(1, 2).reshape(b, n, -1))


class Mlp(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.down(F.gelu(self.up(x))) * scale


class Block(nn.Module):
    def __init__(self, drop: float = 0.0):
        super().__init__()
        self.attention, self.mlp = Attention(drop=drop), Mlp()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(x, mask)
        return x + self.mlp(x)


class Tower(nn.Module):
    def __init__(self, depth: int = 2, drop: float = 0.0):
        super().__init__()
        self.blocks: Any = nn.ModuleList(Block(drop) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


RULES = [TemperRule(Attention), SwishRule(Mlp)]


X = torch.randn(2, 5, 8)


MASK = torch.ones(5, 5, dtype=torch.bool).triu(1)


def tempered(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("temper"):
                parameter.copy_(torch.linspace(0.5, 2.0, parameter.numel()).view_as(parameter))
    return model


def plainly(block: Block, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the expected output of a tempered block, by the own forward's `temper` argument and plain torch."""
    module: Any = block.attention
    x = x + Attention.forward(module, x, mask, temper=module.adapters.default.temper)
    up = block.mlp.up(x)
    return x + block.mlp.down(up * torch.sigmoid(1.702 * up))


@rule("test-swish-once")
class SwishOnceRule(Rule):
    def rewrite(self, site: Any) -> Any:
        gelu = site.find(GELU)[0]
        site.replace(gelu.root, gelu.root * site.param("scale", (1,), 1.0))
