"""C3aRule against its circulant blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgery import apply_rules
from surgery.rules import C3aRule
from surgery.testing import assert_equivalent
from tests.support.delta_methods import Holder, foreign
from tests.support.methods import reproduced


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


@reproduced
@foreign
def test_peft_passes_wrong_gradients_through_c3a() -> None:
    """PEFT's backward has a formula of its own for x. Ours is the gradient of C x, by the same C as PEFT's."""
    from peft.tuners.c3a.utils import BlockCircularConvolution, get_circulant_fast  # type: ignore[import-untyped]

    model: Any = apply_rules(Holder(nn.Linear(4, 8, bias=False)), [C3aRule("m", block_size=4)])
    kernel, x = model.m.adapters.default.kernel, torch.randn(3, 4, requires_grad=True)
    C, weights = get_circulant_fast(kernel.detach()), torch.randn(3, 8)
    (ours,) = torch.autograd.grad(model(x), x, weights)
    assert torch.allclose(ours, weights @ (model.m.weight + C / 4), atol=1e-6)  # float32; sums in another order
    y = BlockCircularConvolution.apply(x, kernel)
    (theirs,) = torch.autograd.grad(y, x, weights)
    assert torch.allclose(y, x @ C.T, atol=1e-6) and not torch.allclose(theirs, weights @ C, atol=1e-2)
