"""The error of a rewrite that fails on the example call: it names the site, the operation and the rule's code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from surgery import Rule, SurgeryError, apply_rules, rule
from surgery.testing import Snapshot


@rule("test-wrong-shape")
class WrongShape(Rule):
    def rewrite(self, site: Any) -> Any:
        return site.output @ site.param("w", (3, 7))


def test_a_wrong_shape_names_the_operation_and_the_rewrite() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match="mat1 and mat2 shapes") as caught:
        apply_rules(model, WrongShape("0"), example_inputs=torch.randn(2, 4))
    assert not before.differences(model)
    where, line = str(caught.value.where), WrongShape.rewrite.__code__.co_firstlineno
    assert where.startswith("at the site 0, ") and "@ adapters_default_w`" in where
    assert where.endswith(f"in WrongShape.rewrite ({__file__}:{line})")
    assert "show(" not in str(caught.value)
