"""Attentions whose products are written out, for tests of prefixes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Base", "Biased", "Called", "Flat", "HEADS", "Plain", "SIZE", "WIDTH", "merge_heads"]


WIDTH, HEADS, SIZE = 12, 3, 4


class Base(nn.Module):
    """Self-attention. Subclasses compute the context from queries, keys and values in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, HEADS, SIZE).transpose(1, 2)


def merge_heads(context: Tensor) -> Tensor:
    return context.transpose(1, 2).reshape(context.shape[0], -1, WIDTH)


class Plain(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None, other: Tensor | None = None) -> Any:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x if other is None else other)), self.heads(self.v(x))
        scores = q @ k.mT / SIZE**0.5
        if mask is not None:
            scores = scores + mask
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return self.out(merge_heads(self.drop(weights) @ v)), weights


class Flat(Base):
    """Batch and heads in one dimension, as in fairseq."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (self.heads(part(x)).reshape(b * HEADS, n, SIZE) for part in (self.q, self.k, self.v))
        scores = torch.bmm(q * SIZE**-0.5, k.transpose(1, 2))
        if mask is not None:
            scores = (scores.view(b, HEADS, n, n) + mask).view(b * HEADS, n, n)
        context = torch.bmm(self.drop(torch.softmax(scores, -1)), v)
        return self.out(merge_heads(context.view(b, HEADS, n, SIZE)))


class Biased(Base):
    """One product with the bias, the scale and the scores in it, as Bloom has it."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (self.heads(part(x)).reshape(b * HEADS, n, SIZE) for part in (self.q, self.k, self.v))
        bias = torch.zeros(b * HEADS, 1, n)
        scores = bias.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=1.0, alpha=SIZE**-0.5).view(b, HEADS, n, n)
        if mask is not None:
            scores = scores.masked_fill(mask < 0, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1).view(b * HEADS, n, n)
        return self.out(merge_heads(torch.bmm(weights, v).view(b, HEADS, n, SIZE)))


class Called(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)))
