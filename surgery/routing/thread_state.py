"""The routing state of the current thread: its open `route` blocks and their plans."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["paused", "thread_routing"]


class _ThreadRouting(threading.local):
    routings: tuple[Any, ...] = ()  # the open `route` blocks, from the outermost to the innermost
    plans: dict[int, Any] | None = None  # the plans of their sites by the site's id; a None item: not made yet


@contextmanager
def paused() -> Iterator[None]:
    """Inside the block, the current thread does not route."""
    before = thread_routing.routings, thread_routing.plans
    thread_routing.routings, thread_routing.plans = (), None
    try:
        yield
    finally:
        thread_routing.routings, thread_routing.plans = before


thread_routing = _ThreadRouting()
