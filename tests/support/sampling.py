"""Which cases `make test` takes of a grid: all of them with ALL_REWRITES=1 (`make rewrites`)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

__all__ = ["sample"]

T = TypeVar("T")


def sample(cases: Iterable[T], every: int) -> list[T]:
    """Every so many of the cases, the first among them; all of them where the whole grid is asked for."""
    found = list(cases)
    return found if os.environ.get("ALL_REWRITES") else found[::every]
