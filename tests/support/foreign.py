"""Replacement modules: typical user code, and torch modules with branches, unpacking and state."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """A mixture of experts."""

    def __init__(self, size: int, experts: int = 4, chosen: int = 2) -> None:
        super().__init__()
        self.gate, self.chosen = nn.Linear(size, experts), chosen
        layers = [nn.Sequential(nn.Linear(size, 6), nn.GELU(), nn.Linear(6, size)) for _ in range(experts)]
        self.experts = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, index = self.gate(flat).softmax(-1).topk(self.chosen, -1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            row, place = torch.where(index == number)
            out.index_add_(0, row, expert(flat[row]) * weights[row, place, None])
        return out.view_as(x)


class Recurrent(nn.Module):
    """An LSTM, written out: it unpacks shapes and loops over time."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.inner, self.outer = size, nn.Linear(size, 4 * size), nn.Linear(size, 4 * size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = c = x.new_zeros(batch, self.size)
        steps = []
        for t in range(length):
            i, f, g, o = (self.inner(x[:, t]) + self.outer(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            steps.append(h)
        return torch.stack(steps, 1)


class Attention(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(size, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Shared(nn.Module):
    """One Linear in three places; its weight in a fourth."""

    def __init__(self, size: int) -> None:
        super().__init__()
        layer = nn.Linear(size, size)
        self.body, self.again, self.tied = nn.Sequential(layer, nn.Tanh(), layer), layer, layer.weight
        self.listed = [layer]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.listed[0](self.body(x)), self.tied) + self.again(x)


class Normal(nn.Module):
    """BatchNorm, and a running mean that the module assigns."""

    mean: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(size)
        self.register_buffer("mean", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return self.norm(x.transpose(1, 2)).transpose(1, 2) - self.mean


class Deciding(nn.Module):
    """Branches on the mode, and has a constant that is not a buffer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.low, self.high, self.shift = nn.Linear(size, size), nn.Linear(size, size), torch.full((size,), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.low(x) if self.training else self.high(x)
        return y + self.shift


class Looking(nn.Module):
    """Branches on values."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) if x.sum() > 0 else self.down(x)


class Several(nn.Module):
    """Two inputs, options, and a tuple of results."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * size, size)

    def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        shift = options.get("shift", 0.0)
        z = self.mix(torch.cat([x, y], -1)) * scale + shift
        return z, {"sum": z.sum(-1)}


class Remembering(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return x + 1


class Counting(nn.Module):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self._count()
        return x + self.count

    def _count(self) -> None:
        self.count += 1


class Listing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x + len(self.seen)


class Host(nn.Module):
    """The parent of the replaced module."""

    def __init__(self, inner: nn.Module, size: int = 4) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(size, size), inner, nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(torch.tanh(self.first(x))))
