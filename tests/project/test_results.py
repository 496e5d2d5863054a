"""Results as plain text of 80 columns, in notebooks and with rich."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from surgery import activate, adapters, apply_rules, coverage, plan_rules, summary
from surgery.results import Displayed, Table, table
from surgery.rules import IA3Rule, LoraRule

NAME = "a_module_with_a_long_name_for_a_table"


def model() -> nn.Module:
    return nn.Sequential(*(nn.ModuleDict({NAME: nn.ModuleDict({NAME: nn.Linear(8, 8)})}) for _ in range(3)))


def results() -> list[Displayed]:
    rewritten = apply_rules(model(), [LoraRule(nn.Linear, rank=2)], adapter="one[red]")
    apply_rules(rewritten, [IA3Rule(nn.Linear)], adapter="two")
    activate(rewritten, "two")
    layers = nn.Sequential(nn.Linear(8, 8))
    return [
        plan_rules(model(), [LoraRule(nn.Linear, rank=2)], adapter="<b>"),
        summary(rewritten),
        *adapters(rewritten).values(),
        adapters(rewritten),  # type: ignore[list-item]
        coverage(layers, torch.ones(1, 8)),
    ]


def without_folds(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("result", results(), ids=lambda result: type(result).__name__)
def test_rich_folds_at_80_columns_and_loses_no_text(result: Displayed) -> None:
    console = pytest.importorskip("rich.console")
    output = io.StringIO()
    console.Console(file=output, width=80, color_system=None).print(result)
    assert max(map(len, output.getvalue().splitlines())) <= 80
    texts = [part for part in result._display_parts() if isinstance(part, str)]
    tables = [part for part in result._display_parts() if isinstance(part, Table)]
    for text in texts:
        assert without_folds(text) in without_folds(output.getvalue())
    for cell in (cell for part in tables for row in part.rows for cell in row if len(cell) < 16):
        assert cell in output.getvalue()


class Cells(HTMLParser):
    """The texts of a table's cells; everything is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        assert tag in ("table", "thead", "tbody", "tr", "th", "td", "pre")
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] in (["td"], ["th"]):
            self.cells[-1] += data


@pytest.mark.parametrize("result", results(), ids=lambda result: type(result).__name__)
def test_notebooks_show_tables(result: Displayed) -> None:
    tables = [part for part in result._display_parts() if isinstance(part, Table)]
    expected = [cell for part in tables for row in (part.head, *part.rows) for cell in row]
    assert Cells(result._repr_html_()).cells == expected  # type: ignore[attr-defined]
    assert "<b>" not in result._repr_html_()


def test_plain_tables_fold_at_80_columns() -> None:
    plan, counts, *_ = results()
    for text in (str(plan), str(counts)):
        lines = text.splitlines()[1:]
        assert max(map(len, lines)) <= 80
        assert without_folds(f"0.{NAME}.{NAME}") in without_folds(text) or text is not str(plan)


def test_a_folded_cell_goes_on_in_its_column() -> None:
    text = table(["site", "tensors", "trainable"], [["encoder.layer.0", "A[2, 8] B[8, 2] magnitude[8]", "40"]], 44)
    assert text.splitlines() == [
        "site             tensors          trainable",
        "encoder.layer.0  A[2, 8] B[8, 2]         40",
        "                 magnitude[8]",
    ]
    assert table(["a"], [["x " * 50]]) == "a\n" + ("x " * 50).rstrip()


def test_a_column_may_be_empty() -> None:
    assert table(["", "b"], [["", "1"]]).split() == ["b", "1"]
    assert table([""], [[""]]) == "\n"
