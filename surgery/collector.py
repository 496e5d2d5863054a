"""Python's garbage collector, which waits while a verb makes many objects that all stay."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_waits"]


@contextmanager
def collector_waits() -> Iterator[None]:
    """No cycles are looked for inside of the block, in any thread; what is no longer used is freed as ever.

    A plan for some thousand sites makes so many records that the collector goes through all of the process's objects
    again and again, and finds nothing: half of the time. Blocks may be nested, and open in several threads.
    """
    global _blocks, _stopped
    with _lock:
        if not _blocks and gc.isenabled():
            gc.disable()
            _stopped = True
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks and _stopped:
                gc.enable()
                _stopped = False


_lock = threading.Lock()
_blocks, _stopped = 0, False
