"""Python's garbage collector, which waits while a verb makes many objects that all stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_waits"]


@contextmanager
def collector_waits() -> Iterator[None]:
    """No cycles are looked for inside of the block, in any thread; what is no longer used is freed as ever.

    A plan for some thousand sites makes so many records that the collector goes through all of the process's objects
    again and again, and finds nothing: half of the time. Blocks may be nested, and open in several threads.
    """
    block = object()
    try:
        try:
            _enter(block)
            yield
        finally:
            _leave(block)
    finally:  # once more, where it was broken off; else nothing is left to do
        _leave(block)


# No lock: an interrupt may come between any two lines, and a lock that is not given back stops the process. Threads
# that come and go at one moment may leave the collector on, which costs time alone.


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
