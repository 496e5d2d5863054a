"""PEFT's checkpoints both ways: every row of the page of peers, all cells (tests/support/conformance.py)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

import surgery.rules  # noqa: F401  # brings the methods
from surgery import load_adapter, load_adapters, remove, save_adapter
from tests.reports.conformance import MARKS, table
from tests.support import ROOT
from tests.support.conformance import IDS, ROWS, Row, build, check, in_peft, near
from tests.support.peers import peft

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]  # PEFT's own words


@pytest.mark.skipif(peft.__version__ != "0.21.2", reason="the rows are of PEFT 0.21.2's configurations")
@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_checkpoint_crosses_both_ways(row: Row, tmp_path: Path) -> None:
    wrong = {cell: why for cell, why in check(row, tmp_path).items() if why}
    assert not wrong


def test_the_table_has_every_row() -> None:
    page = Path("docs/reference/peft-checkpoints.md").resolve()
    page = page if page.exists() else ROOT / "docs/reference/peft-checkpoints.md"
    shown = page.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert [line.split(" | ")[:3] for line in shown.strip().splitlines()] == [
        line.split(" | ")[:3] for line in table({}).strip().splitlines()
    ], "run make peers"
    assert "✗" not in shown


def test_every_method_has_rows() -> None:
    counts = {method: sum(row.method == method for row in ROWS) for method in {row.method for row in ROWS}}
    assert counts.pop("Lora") >= 46 and min(counts.values()) >= 5


def test_adalora_with_directions_taken_out(tmp_path: Path) -> None:
    """As PEFT saves it after its ranks were shared out: the others are not in the file, and the scale stays."""
    model, call = build(
        row := Row("AdaLora", "MLP", {"target_modules": ["lin0", "lin1"], "init_r": 4, "total_step": 9})
    )
    theirs = in_peft(row, model)
    left = {"lin0.lora_E": [True, False, True, True], "lin1.lora_E": [False, False, False, True]}
    theirs.peft_config["default"].rank_pattern = left
    theirs.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    load_adapter(model, tmp_path)
    assert near(call(model), call(again)) and not near(call(theirs), call(again))
    save_adapter(model, tmp_path / "ours", format="peft")
    expected = call(model)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(remove(model)), str(tmp_path / "ours")).eval()
    assert near(call(again), expected)


def test_several_of_pefts_adapters_in_one_folder(tmp_path: Path) -> None:
    model, call = build(row := Row("Lora", "MLP", {"target_modules": ["lin0"]}))
    theirs = in_peft(row, model)
    theirs.add_adapter("second", peft.LoraConfig(target_modules=["lin1"], r=3, init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    assert list(load_adapters(model, tmp_path)) == ["default", "second"]
    theirs.base_model.set_adapter(["default", "second"])
    assert near(call(model), call(theirs))
    theirs.set_adapter("second")
    remove(model, "default")
    assert near(call(model), call(theirs))
