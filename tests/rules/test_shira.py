"""ShiraRule: values of its fields."""

from __future__ import annotations

from typing import Any

import pytest

from surgery import RuleError
from surgery.rules import ShiraRule


@pytest.mark.parametrize("fields", [{"rank": 0}, {"rank": 1.5}, {"init": "zero"}, {"random_seed": -1}], ids=str)
def test_values_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(RuleError, match=next(iter(fields))):
        ShiraRule("m", **fields)
