"""Pauses Python's garbage collector while a verb creates many objects that all stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_waits"]


@contextmanager
def collector_waits() -> Iterator[None]:
    """Pause the search for reference cycles inside the block, in all threads. Reference counting still frees objects.

    A plan for a thousand sites creates so many records that the collector scans all objects of the process again and
    again, which took half of the time. Blocks may be nested, and open in several threads.
    """
    block = object()
    try:
        try:
            _enter(block)
            yield
        finally:
            _leave(block)
    finally:  # again, in case an interrupt stopped it
        _leave(block)


# No lock: an interrupt may come between any two lines, and an unreleased lock would stop the process. Threads that
# enter and leave at the same moment may leave the collector on, which only costs time.


def _enter(block: object) -> None:
    global _stopped
    _blocks.add(block)
    if gc.isenabled():
        _stopped = True
        gc.disable()


def _leave(block: object) -> None:
    global _stopped
    _blocks.discard(block)
    if _stopped and not _blocks:
        gc.enable()
        _stopped = False


_blocks: set[object] = set()
_stopped = False  # whether the collector was on before the first block
