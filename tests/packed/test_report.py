"""The page that `make quantised` writes has a row for each layout."""

from __future__ import annotations

from tests.reports.quantised import BEGIN, CHECKS, END, PAGE, ROWS
from tests.support.packed_experts import EXPERT_MODELS


def test_the_page_has_a_row_for_each_layout() -> None:
    made = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in made.splitlines() if line.startswith("| ")}
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert set(rows) == {
        "layout",
        *(row.name for row in ROWS),
        "stacks of experts",
        *(case.title for case in EXPERT_MODELS),
    }
    assert all(name in rows["layout"] for name in CHECKS)
    assert "✘" not in made, "run `make quantised`"
