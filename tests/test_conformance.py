"""PEFT's checkpoints both ways: every row of the table in docs/peers.md, all of its cells (tests/conformance.py)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rules  # noqa: F401  # brings the methods
from tests.conformance import IDS, ROWS, Row, check
from tests.conformance_report import MARKS, table

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft: Any = pytest.importorskip("peft", reason="compares with PEFT")
    pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.skipif(peft.__version__ != "0.21.2", reason="the rows are of PEFT 0.21.2's configurations")
@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_checkpoint_crosses_both_ways(row: Row, tmp_path: Path) -> None:
    wrong = {cell: why for cell, why in check(row, tmp_path).items() if why}
    assert not wrong


def test_the_table_has_every_row() -> None:
    page = Path("docs/peers.md").resolve()
    page = page if page.exists() else Path(__file__).parent.parent / "docs/peers.md"
    shown = page.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert [line.split(" | ")[:3] for line in shown.strip().splitlines()] == [
        line.split(" | ")[:3] for line in table({}).strip().splitlines()
    ], "run make peers"
    assert "✗" not in shown


def test_every_method_has_rows() -> None:
    counts = {method: sum(row.method == method for row in ROWS) for method in {row.method for row in ROWS}}
    assert counts.pop("Lora") >= 46 and min(counts.values()) >= 5
