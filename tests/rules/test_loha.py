"""LohaRule: its gradients beside PEFT's, and patterns of ranks and alphas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from surgery import apply_rules
from surgery.rules import LohaRule
from tests.support.method_formulas import loha
from tests.support.methods import METHODS, example, in_peft, reproduced, theirs_of


@reproduced
@pytest.mark.filterwarnings("ignore")
def test_peft_gives_loha_gradients_of_another_function() -> None:
    method = METHODS["loha-effective"]
    layer = in_peft(example("Conv2d")[0], method, init_weights=False).base_model.model.m
    params = theirs_of(layer, method)
    layer.get_delta_weight("default").sum().backward()
    twin = {key: tensor.detach().clone().requires_grad_() for key, tensor in params.items()}
    loha(torch.zeros(12, 8, 3, 3), torch.zeros(12), twin, method.rule)[0].sum().backward()
    for key, tensor in params.items():
        assert tensor.grad is not None
        assert torch.allclose(tensor.grad, twin[key].grad, atol=1e-5) == (key not in ("w1_a", "w2_a")), key  # type: ignore[arg-type]


def test_patterns_choose_rank_and_alpha() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    apply_rules(model, [LohaRule(nn.Linear, rank=2, rank_pattern={"1": 3}, alpha_pattern={"0": 5})])
    assert [layer.adapters.default.w1_a.shape[1] for layer in model] == [2, 3]
    assert [LohaRule("x", rank=2, alpha=4, alpha_pattern={"0": 5}).scale_at(path) for path in "01"] == [2.5, 2.0]
