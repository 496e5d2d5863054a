"""An unknown rule name: the error lists the names that a file can have."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from surgery import Rule, RuleError, Site, rule
from surgery.rules.invocation import InvocationRule


@rule("own-of-this-test")
class OwnRule(Rule):
    def rewrite(self, site: Site) -> torch.Tensor:
        return cast(Any, site.output)


def test_internal_rules_are_not_listed() -> None:
    with pytest.raises(RuleError) as caught:
        Rule.from_dict({"rule": "zzzzq"})
    assert caught.value.why is not None
    names = caught.value.why.removeprefix("known rules: ").split(", ")
    assert {"lora", "train", "base-rows", OwnRule.name} <= set(names)
    assert InvocationRule.name not in names and not any(name.endswith("-slot") for name in names)
    assert Rule.from_dict({"rule": InvocationRule.name, "tokens": [1]}) == InvocationRule(tokens=[1])  # if asked for
