"""BoftRule: dropout of blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from surgery import apply_rules
from surgery.rules import BoftRule
from tests.support.methods import Holder


def test_boft_dropout_lets_blocks_stand_still() -> None:
    model: Any = Holder(nn.Linear(400, 3, bias=False))
    weight = model.m.weight.detach().clone()
    apply_rules(model, [BoftRule("m", dropout=0.4, init="random")])
    model.m.adapters.default.s.data.fill_(1.0)
    moved = (model.train()(torch.eye(400)).T - weight).view(3, 100, 4).abs().amax((0, 2)) > 1e-6
    assert 0.4 < moved.float().mean() < 0.8
    assert bool(((model.eval()(torch.eye(400)).T - weight).view(3, 100, 4).abs().amax((0, 2)) > 1e-6).all())
