"""Plans, summaries and reports as dicts, JSON text and rows for tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery import Pattern, apply_rules, coverage, load_adapter, merge, plan_rules, remove, save_adapter, summary
from surgery.onnx.checking.report import Compared, Decoded, ParityReport
from surgery.results import plain
from surgery.rules import LoraRule


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def loaded(folder: Path) -> Any:
    save_adapter(apply_rules(model(), LoraRule(["0", "2"], rank=2)), folder)
    with pytest.warns(UserWarning, match="another base"):
        return load_adapter(remove(apply_rules(model(), LoraRule("0"))), folder, same_base=False)


REPORTS: dict[str, Callable[[Path], Any]] = {
    "Plan": lambda _: plan_rules(model(), LoraRule(["0", "2"], rank=2)),
    "Summary": lambda _: summary(apply_rules(model(), LoraRule(["0", "2"], rank=2))),
    "Coverage": lambda _: coverage(model(), torch.ones(1, 4)),
    "MergeReport": lambda _: merge(apply_rules(model(), LoraRule("0", rank=2))),
    "LoadReport": loaded,
    "ParityReport": lambda _: ParityReport("m.onnx", [Compared("a", "batch 2", True, "y", float("inf"), 1e-4)]),
}


@pytest.mark.parametrize("kind", REPORTS)
def test_reports_are_json_and_flat_rows(kind: str, tmp_path: Path) -> None:
    report = REPORTS[kind](tmp_path)
    assert type(report).__name__ == kind
    assert json.loads(report.to_json(), parse_constant=pytest.fail) == plain(report.to_dict())
    rows = report.to_rows()
    assert rows and all(row.keys() == rows[0].keys() for row in rows)
    assert all(value is None or isinstance(value, (str, int, float)) for row in rows for value in row.values())


def test_rows_say_what_the_table_says() -> None:
    plan = plan_rules(model(), LoraRule(["0", "2"], rank=2))
    assert [(row["site"], row["tensors"], row["trainable"]) for row in plan.to_rows()] == [
        ("0", "A[2, 4] B[4, 2]", 16),
        ("2", "A[2, 4] B[2, 2]", 12),
    ]
    adapted = apply_rules(model(), LoraRule("0", rank=2))
    assert summary(adapted).to_rows() == [
        {"adapter": "default", "rule": "LoraRule", "sites": 1, "added": 16, "trainable": 16, "state": "live"}
    ]
    parity = ParityReport("m.onnx", [], [Decoded("a", (1, 2), (1, 3), gap=1.0)])
    assert json.loads(parity.to_json())["decoded"][0]["ok"] is False and not json.loads(parity.to_json())["ok"]


def test_a_rule_that_is_not_data_becomes_its_text() -> None:
    rule = LoraRule(Pattern.where(lambda module: True))
    assert plain({"rules": (rule,)}) == {"rules": [repr(rule)]}
    assert plain([LoraRule("0")]) == [LoraRule("0").to_dict()]
