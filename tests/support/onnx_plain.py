"""Plain modules of many calling conventions, each with an example and the layers that get adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Case = tuple[nn.Module, Any, list[str]]  # a model, example inputs, targets


class Net(nn.Module):
    """Linears, a grouped convolution and a number as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=2)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.b(self.conv(torch.relu(self.a(x)).transpose(1, 2)).transpose(1, 2)) * scale


class Line(nn.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.a = nn.Linear(size, size)


class Starred(Line):
    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.a(x) + 1 for x in xs)


class Keywords(Line):
    def forward(self, x: Tensor, **further: Any) -> Tensor:
        return self.a(x) * further["scale"] + further["shift"]


class Placed(Line):
    def forward(self, x: Tensor, /, y: Tensor, *, z: Tensor | None = None) -> Tensor:
        return self.a(x) + y + (0 if z is None else z)


class Nested(Line):
    def forward(self, x: Tensor, others: dict[str, Any]) -> dict[str, Any]:
        y = self.a(x)
        return {"y": y, "more": [y + others["p"], (y.argmax(-1), y > 0)], "pair": y + others["q"][1], "none": None}


@dataclasses.dataclass
class Output:
    y: Tensor
    total: Tensor


class Data(Line):
    def forward(self, x: Tensor) -> Output:
        y = self.a(x)
        return Output(y, y.sum(-1))


class Pair(NamedTuple):
    y: Tensor
    total: Tensor


class Named(Line):
    def forward(self, x: Tensor) -> Pair:
        y = self.a(x)
        return Pair(y, y.sum(-1))


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.a = nn.Embedding(10, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor, mask: Tensor | None = None, flip: bool = False) -> tuple[Tensor, Tensor]:
        y = self.a(self.words(ids))
        y = y if mask is None else y.masked_fill(~mask[..., None], 0.0)
        return (-y if flip else y), ids


class Tied(nn.Module):
    """One weight is used as a matrix, and one layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.a = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.a(self.a(self.words(ids))))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Mixed(nn.Module):
    """Double and single precision, integers and booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4).double(), nn.Linear(4, 4)

    def forward(self, x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        return self.a(x) + i, self.b(x.float()), i.to(torch.int32), i > 1


class Holes(Line):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return torch.sqrt(y), torch.where(y > 0, y, float("-inf"))


class Twice(Line):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.a(x)
        return y, y, x


class Drawing(Line):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.a(x) + torch.randn_like(x)


def graph_module() -> nn.Module:
    return torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)))


r = torch.randn
PLAIN: dict[str, Callable[[], Case]] = {
    "net": lambda: (Net(), (r(1, 5, 8),), ["a", "conv", "b"]),
    "starred": lambda: (Starred(), (r(2, 3, 4), r(5, 4)), ["a"]),
    "keywords": lambda: (Keywords(), {"x": r(2, 4), "scale": r(2, 4), "shift": 2.0}, ["a"]),
    "placed": lambda: (Placed(), (r(2, 4), r(2, 4)), ["a"]),
    "nested": lambda: (Nested(), {"x": r(2, 4), "others": {"p": r(2, 4), "q": (r(2, 4), r(2, 4))}}, ["a"]),
    "dataclass": lambda: (Data(), r(2, 4), ["a"]),
    "named tuple": lambda: (Named(), r(2, 4), ["a"]),
    "mask": lambda: (
        Text(), {"ids": torch.randint(0, 10, (2, 5)), "mask": torch.arange(5) < torch.tensor([[5], [3]])}, ["a"],
    ),
    "one token": lambda: (
        Text(), {"ids": torch.randint(0, 10, (1, 1), dtype=torch.int32), "flip": True}, ["a", "words"],
    ),
    "tied": lambda: (Tied(), torch.randint(0, 10, (2, 5)), ["a"]),
    "encoder": lambda: (
        Encoder(), (r(2, 5, 8), torch.arange(5) >= torch.tensor([[4], [2]])), ["linear1", "head"],
    ),
    "pictures": lambda: (Pictures(), r(1, 3, 8, 8), ["head"]),
    "several dtypes": lambda: (Mixed(), (r(2, 4).double(), torch.arange(4)[None].repeat(2, 1)), ["a", "b"]),
    "holes": lambda: (Holes(), r(2, 4), ["a"]),
    "twice": lambda: (Twice(), r(2, 4), ["a"]),
    "graph module": lambda: (graph_module(), r(4, 4), ["0", "2"]),
    "one layer": lambda: (nn.Linear(4, 3), r(2, 4), []),
}  # fmt: skip
