"""RandLoraRule: the rank of its change, and its bases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from surgery import apply_rules, merge
from surgery.rules import RandLoraRule
from tests.support.delta_methods import Holder, disturb


@pytest.mark.parametrize("fields", [{}, {"sparse": True}, {"very_sparse": True}], ids=str)
def test_randlora_has_full_rank(fields: dict[str, Any]) -> None:
    model: Any = Holder(nn.Linear(64, 48))
    before = model.m.weight.detach().clone()
    apply_rules(model, [RandLoraRule("m", rank=8, **fields)])
    params = model.m.adapters.default
    for base in (params.A, params.B):
        assert abs(float(base.std()) - 1) < 2**-9  # they are drawn in bfloat16, as PEFT draws them
        values = base.unique()
        assert len(values) == 3 if fields else len(values) > 3
    disturb(model)
    merge(model)
    rank = int(torch.linalg.matrix_rank(model.m.weight - before))
    assert rank == 48 if not fields else 8 < rank <= 48  # a sparse base may have empty columns
