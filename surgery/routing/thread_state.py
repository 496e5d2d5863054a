"""What the present thread is routing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["here", "paused"]


class _ThreadRouting(threading.local):
    routings: tuple[Any, ...] = ()  # the open blocks of `route`, the last one innermost
    plans: dict[int, Any] | None = None  # what their sites run, by the site's id; None where it is not made yet


@contextmanager
def paused() -> Iterator[None]:
    """The thread routes nothing inside the block."""
    before = here.routings, here.plans
    here.routings, here.plans = (), None
    try:
        yield
    finally:
        here.routings, here.plans = before


here = _ThreadRouting()
