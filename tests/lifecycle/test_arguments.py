"""Every verb refuses an argument that is not a model, and says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import surgery
from surgery import SurgeryError

VERBS: dict[str, Callable[[Any], Any]] = {
    "apply_rules": lambda model: surgery.apply_rules(model, []),
    "plan_rules": lambda model: surgery.plan_rules(model, []).raise_problems(),
    "route": lambda model: surgery.route(model, ["a"]).__enter__(),
    "using": lambda model: surgery.using(model, "a").__enter__(),
    "save_adapter": lambda model: surgery.save_adapter(model, "folder"),
    "load_adapter": lambda model: surgery.load_adapter(model, "folder"),
    "merge_to": lambda model: surgery.merge_to(model, "folder"),
    "hotswap": lambda model: surgery.hotswap(model, "a", "folder"),
    "combine": lambda model: surgery.combine(model, {"a": 1.0}, into="b"),
    "as_lora": lambda model: surgery.as_lora(model, "a"),
    "rename_adapter": lambda model: surgery.rename_adapter(model, "a", "b"),
    "copy_adapter": lambda model: surgery.copy_adapter(model, "a", "b"),
    **{
        name: getattr(surgery, name)
        for name in ("activate", "adapter_state_dict", "adapters", "base_state_dict", "deactivate", "folded_adapter")
        + ("forget", "merge", "remove", "rules_of", "show", "summary", "unmerge")
    },
}


@pytest.mark.parametrize("argument", [3, None, nn.Linear, [nn.Linear(2, 2)]], ids=["int", "None", "class", "list"])
@pytest.mark.parametrize("name", sorted(VERBS))
def test_an_argument_that_is_not_a_module_is_refused(name: str, argument: object) -> None:
    with pytest.raises(SurgeryError):
        VERBS[name](argument)
