"""FourierRule against the sum of its cosines."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.rules import FourierRule
from surgery.testing import assert_equivalent
from tests.support.delta_methods import Holder


def test_fourier_by_hand() -> None:
    model: Any = Holder(nn.Linear(5, 3))

    def by_hand(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        delta = torch.zeros(3, 5)
        for place, value in zip(tensors["m.adapters.index"].tolist(), tensors["m.adapters.spectrum"], strict=True):
            k, l = divmod(place, 5)  # noqa: E741
            rows, columns = torch.arange(3).view(-1, 1), torch.arange(5)
            delta += value * torch.cos(2 * torch.pi * (k * rows / 3 + l * columns / 5)) / 15
        return F.linear(x, model.m.weight + 7 * delta, model.m.bias)

    assert_equivalent(model, [FourierRule("m", n_frequency=4, scaling=7.0)], by_hand, torch.randn(2, 5))
