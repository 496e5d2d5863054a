"""The cases and programs of `make interop` fit together. The programs themselves run in `make interop`."""

from __future__ import annotations

import ast

import pytest

from surgery import Rule
from tests.reports.interop.bases import BASES
from tests.reports.interop.cases import CASES, AdapterCase
from tests.reports.interop.engines import ENGINES, Engine
from tests.reports.interop.environments import torch_pin
from tests.reports.interop.page import BEGIN, END, PAGE


def test_every_case_has_its_own_name() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_names_adapters_that_exist(case: AdapterCase) -> None:
    named = {name for step in case.steps for name in (*step.active, *step.rows) if name}
    assert named == case.adapters.keys() and not case.steps[0].active and not case.steps[-1].active
    if case.kind == "decoder":
        assert case.base in BASES
        for rules in case.adapters.values():
            assert [Rule.from_dict(rule) for rule in rules]


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.name)
def test_a_program_has_a_script_and_versions(engine: Engine) -> None:
    tree = ast.parse(engine.script.read_text(encoding="utf-8"))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {module for module in imported if module.startswith(("surgery", "tests"))}  # it runs alone
    if engine.own_environment:
        lines = engine.requirements.read_text(encoding="utf-8").split()
        assert lines and all("==" in line for line in lines)
    assert {case.name for case in CASES} >= engine.base_faults.keys() and torch_pin().startswith("torch==")


def test_the_page_has_every_row_and_column() -> None:
    made = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = {line.split(" | ")[0].removeprefix("| ") for line in made.splitlines() if line.startswith("| ")}
    assert rows - {"adapter"} == {case.name for case in CASES}
    assert all(engine.title in made for engine in ENGINES.values())
