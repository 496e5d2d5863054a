"""A rule class without `@rule`: it works on a model, and files refuse it, because they could not name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery import (
    Rule,
    RuleError,
    apply_rules,
    load_adapter,
    remove,
    rule,
    rules_to_json,
    rules_to_yaml,
    save_adapter,
)
from surgery.rules import LoraRule


class Doubled(Rule):
    def rewrite(self, site: Any) -> Any:
        return site.output * site.param("gain", (site.out_features,), 2.0)


class OtherLora(LoraRule):
    """A subclass of a rule with a name, which a file would read as the rule with the name."""

    def rewrite(self, site: Any) -> Any:
        return super().rewrite(site) * 2  # type: ignore[operator]


@pytest.mark.parametrize("made", [Doubled("0"), OtherLora("0", rank=2)], ids=["rule", "subclass"])
def test_it_is_applied_and_not_written(made: Rule, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    before = model(x)
    assert torch.equal(apply_rules(model, made)(x), before * 2)
    for write in (
        lambda: rules_to_json([made]),
        lambda: rules_to_yaml([made]),
        lambda: save_adapter(model, tmp_path / "a"),
        lambda: save_adapter(model, tmp_path / "a", format="peft"),
        lambda: save_adapter(model, tmp_path / "a", format="surgery"),
    ):
        with pytest.raises(RuleError, match="is not decorated with @rule") as caught:
            write()
        assert caught.value.fix is not None and f'rule("its-name")({type(made).__name__})' in caught.value.fix
    assert not (tmp_path / "a").exists()


def test_the_fix_names_a_class_that_is_applied_already(tmp_path: Path) -> None:
    class Late(Rule):
        def rewrite(self, site: Any) -> Any:
            return site.output * site.param("gain", (site.out_features,), 2.0)

    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    output = apply_rules(model, Late("0"))(x)
    rule("test-named-late")(Late)
    save_adapter(model, tmp_path)
    load_adapter(remove(model), tmp_path)
    assert torch.equal(model(x), output)
