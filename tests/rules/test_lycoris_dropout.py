"""Dropout of rows and of the whole change, which LohaRule and LokrRule share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from surgery import apply_rules
from surgery.rules import LohaRule, LokrRule
from tests.support.methods import Holder


@pytest.mark.parametrize("kind, rescaled", [(LohaRule, True), (LokrRule, False), (LokrRule, True)])
def test_rank_dropout_takes_out_rows_of_the_change(kind: Any, rescaled: bool) -> None:
    more: dict[str, Any] = {"rank_dropout_scale": rescaled} if kind is LokrRule else {}
    model: Any = Holder(nn.Linear(16, 200, bias=False))
    base = model.m.weight.detach().clone()
    apply_rules(model, [kind("m", rank=2, rank_dropout=0.3, init="random", **more)])
    eye = torch.eye(16)
    whole = model.eval()(eye).T - base
    dropped = model.train()(eye).T - base
    kept_rows = dropped.abs().sum(1) > 1e-6
    assert 0.55 < kept_rows.float().mean() < 0.85
    grown = 1 / kept_rows.float().mean() if rescaled else torch.tensor(1.0)
    torch.testing.assert_close(dropped[kept_rows], whole[kept_rows] * grown, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [LohaRule, LokrRule])
def test_module_dropout_takes_out_the_whole_change(kind: Any) -> None:
    model: Any = Holder(nn.Linear(16, 12))
    x = torch.randn(2, 16)
    plain = model(x)
    apply_rules(model, [kind("m", rank=2, module_dropout=0.5, init="random")])
    whole = model.eval()(x)
    model.train()
    outputs = [model(x) for _ in range(40)]
    gone = [bool(torch.equal(output, plain)) for output in outputs]
    assert 8 < sum(gone) < 32
    assert all(torch.equal(output, whole) for output, out in zip(outputs, gone, strict=True) if not out)
