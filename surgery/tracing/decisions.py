"""Checks the decisions of Python on which recorded code depends. A call with another decision needs other code."""

from __future__ import annotations

from typing import Any

import torch

from surgery.errors import SiteError
from surgery.tracing.guards import differs, parts_of

__all__ = ["OtherDecision", "check_decision", "decide", "decide_parts"]


class OtherDecision(Exception):
    """A decision of a call differs from the traced call. `late`: the graph has already written or drawn numbers."""

    def __init__(self, value: Any, expected: Any, where: str, late: bool):
        self.value, self.expected, self.where, self.late = value, expected, where, late

    def __str__(self) -> str:
        return f"{self.value!r} is decided instead of {self.expected!r}"


def decide(value: Any, expected: Any, where: str, late: bool) -> None:
    """Raise `OtherDecision` if Python would decide differently on a value than in the traced call."""
    if differs(value, expected):
        raise OtherDecision(value, expected, where, late)


def decide_parts(value: Any, parts: Any, where: str, *flags: bool) -> None:
    """Raise `OtherDecision` if the parts of a value differ from those in the traced call."""
    *deep, late = flags
    if parts_of(value, *deep) != parts:
        raise OtherDecision(parts_of(value, *deep), parts, where, late)


def check_decision(value: Any, expected: Any, where: str) -> None:
    """Raise `SiteError` if Python would decide differently on a value of a rewrite than in the example."""
    if differs(value, expected):
        raise SiteError(
            f"a rewrite depends on a {_noun(expected)} that is {expected!r} in the example and {value!r} in this call",
            where=where,
            why="Python code of a rewrite runs once, when the rule is applied",
            fix="use torch functions, which take sizes as values, or site.apply(function, …), which runs at each call",
        )


def _noun(expected: Any) -> str:
    if isinstance(expected, torch.Size):
        return "shape"
    return "size or number" if type(expected) is int else "value"
