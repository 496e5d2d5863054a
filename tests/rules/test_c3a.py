"""C3aRule against its circulant blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgery.rules import C3aRule
from surgery.testing import assert_equivalent
from tests.support.delta_methods import Holder


def test_c3a_by_hand() -> None:
    model: Any = Holder(nn.Linear(6, 3, bias=False))

    def by_hand(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        kernel, C = tensors["m.adapters.kernel"], torch.zeros(3, 6)
        for block in range(2):
            for i in range(3):
                for j in range(3):
                    C[i, 3 * block + j] = kernel[0, block, (j - i) % 3]
        return x @ (model.m.weight + C / 6).T

    assert_equivalent(model, [C3aRule("m", block_size=3)], by_hand, torch.randn(2, 6))
