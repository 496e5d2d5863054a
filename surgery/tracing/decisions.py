"""Decisions of Python that recorded code depends on: a call that decides otherwise gets other code, or an error."""

from __future__ import annotations

from typing import Any

from surgery.errors import SiteError
from surgery.tracing.guards import differs, parts_of

__all__ = ["Otherwise", "check_decision", "decide", "decide_parts"]


class Otherwise(Exception):
    """A call decides otherwise than the one that its graph is of. `late`: something was written or drawn before."""

    def __init__(self, found: Any, expected: Any, where: str, late: bool):
        self.found, self.expected, self.where, self.late = found, expected, where, late

    def __str__(self) -> str:
        return f"{self.found!r} is decided instead of {self.expected!r}"


def decide(found: Any, expected: Any, where: str, late: bool) -> None:
    """Raise `Otherwise` unless Python would decide as in the traced call."""
    if differs(found, expected):
        raise Otherwise(found, expected, where, late)


def decide_parts(found: Any, parts: Any, where: str, *more: bool) -> None:
    """Raise `Otherwise` unless something has the parts that it has in the traced call."""
    *deep, late = more
    if parts_of(found, *deep) != parts:
        raise Otherwise(parts_of(found, *deep), parts, where, late)


def check_decision(found: Any, expected: Any, where: str) -> None:
    """Raise `SiteError` unless Python would decide on a value of a rewrite as it did on the example."""
    if differs(found, expected):
        raise SiteError(
            f"a rewrite goes by {expected!r}, which it saw in the example, and this call gives {found!r}",
            where=where,
            why="Python code of a rewrite runs once, when the rule is applied",
            fix="use torch functions, which take sizes as values, or site.apply(function, …), which runs at each call",
        )
