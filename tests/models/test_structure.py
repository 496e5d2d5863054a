"""Structural rules on models of a few families; `make structure` runs all of its table."""

from __future__ import annotations

import warnings

import pytest

from tests.support.structure_checks import OPERATIONS, outcomes

SAMPLE = [("gemma3", operation) for operation in OPERATIONS if operation != "reorder"]
SAMPLE += [("deepseek_v3", "reorder")]  # two kinds of layers, which no configuration exchanges


@pytest.mark.parametrize(("name", "operation"), SAMPLE)
def test_every_check_holds(name: str, operation: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = outcomes(name, operation)
    assert isinstance(results, dict), results
    assert {check: why for check, why in results.items() if why not in (None, "–")} == {}


def test_a_list_that_can_not_change_alone_is_refused() -> None:
    assert "relative_attention_bias" in str(outcomes("t5", "reorder"))
