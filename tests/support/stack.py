"""A model without a configuration, with the paths of a Llama: structural rules on it need no search of fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Stack", "stack"]

SIZE = 8


@dataclass
class Output:
    logits: Tensor


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(SIZE, SIZE, bias=False)
        self.v_proj = nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x).tanh() * self.v_proj(x)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(x).tanh()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(x)
        return x + self.mlp(x)


class Inner(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, SIZE)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Stack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.model = Inner(layers)
        self.lm_head = nn.Linear(SIZE, 50, bias=False)

    def forward(self, ids: Tensor) -> Output:
        return Output(self.lm_head(self.model(ids)))


def stack(layers: int = 4) -> Any:
    torch.manual_seed(0)
    return Stack(layers).eval()
