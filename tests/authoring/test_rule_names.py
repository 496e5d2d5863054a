"""How many names a person meets who writes a rule, and which names every rule has."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery
from surgery import Rule, Site, SlotRule, activate, apply_rules, load_adapter, route, rule, save_adapter, show
from surgery.testing import assert_reversible

MOST = 8  # names of the project in a first rule, besides targets and the rule's own fields


@rule("test-first-rule")
class FirstRule(Rule):
    start: float = 1.0
    identity = True

    def check(self, module: nn.Module, path: str) -> str | None:
        return None if isinstance(module, nn.Linear) else "it is not a Linear"

    def rewrite(self, site: Any) -> Any:
        return site.output * site.param("gain", (site.out_features,), self.start)


def names_in(kind: type) -> set[str]:
    """The project's names that the source of a rule has: public names, hooks and flags, and attributes of the site."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    words |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return words & {*surgery.__all__, *dir(Rule), *dir(Site)}


def test_a_first_rule_needs_eight_names() -> None:
    assert names_in(FirstRule) == {
        *("rule", "Rule", "identity", "check", "rewrite"),
        *("output", "param", "out_features"),
    }
    assert len(names_in(FirstRule)) <= MOST


def test_a_first_rule_is_complete(tmp_path: Path) -> None:
    """With these names alone a rule is planned, shown, switched, routed, saved, loaded and removed."""
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    assert_reversible(model, [FirstRule("0")], example_inputs=x)
    base = model(x)
    for name, start in (("a", 2.0), ("b", 3.0)):
        apply_rules(model, FirstRule("0", start=start), adapter=name)
    assert torch.equal(activate(model, "a")(x), base * 2.0)
    assert "y * gain" in str(show(model, "0"))
    activate(model, ["a", "b"])
    with route(model, ["a", "b"]):
        assert torch.equal(model(x), torch.stack([base[0] * 2.0, base[1] * 3.0]))
    save_adapter(model, tmp_path, "b")
    other = nn.Sequential(nn.Linear(4, 3))
    other.load_state_dict(surgery.base_state_dict(model))
    load_adapter(other, tmp_path)
    assert torch.equal(other(x), base * 3.0)


def test_names_of_slots_are_not_names_of_every_rule() -> None:
    names = {name for name in vars(SlotRule) if not name.startswith("_")}
    assert names == {"free", "unslotted", "slot_notes", "slot_first", "zeros_are_none"}
    assert not names & set(dir(Rule))
