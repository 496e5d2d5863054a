"""Progress of long functions: a bar on a terminal, or calls of the user's function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

from surgery.errors import SurgeryError

__all__ = ["Progress", "each_step", "steps"]

T = TypeVar("T")

# What `progress=` takes: whether to draw a bar, or a function of (what is done, steps done, steps in all).
Progress = bool | Callable[[str, int, int], object]


@contextmanager
def steps(progress: Progress, what: str, total: int) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each of `total` steps.

    >>> with steps(lambda what, done, total: print(f"{what}: {done} of {total}"), "merge", 2) as step:
    ...     step()
    merge: 0 of 2
    merge: 1 of 2

    True draws a bar with rich, if stderr is a terminal. An error of the user's function ends the work like any other.
    """
    if progress is False:
        yield lambda: None
    elif progress is True:
        if find_spec("rich") is None:
            fix = "pip install 'model-surgery[cli]', or pass a function of (what, done, total)"
            raise SurgeryError("a progress bar needs rich", fix=fix)
        if sys.stderr is not None and sys.stderr.isatty():
            with _bar(what, total) as step:
                yield step
        else:
            yield lambda: None
    elif callable(progress):
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            progress(what, done, total)

        progress(what, 0, total)
        yield step
    else:
        fix = "True for a bar, or a function of (what, done, total)"
        raise SurgeryError(f"progress={progress!r} is neither a bool nor a function", fix=fix)


@contextmanager
def each_step(items: Collection[T], progress: Progress, what: str) -> Iterator[Iterator[T]]:
    """Yields an iterator of items; each is a step, which is done when the next item is asked for.

    A block, so that a bar also ends at once when an item's work fails.
    """
    with steps(progress, what, len(items)) as step:

        def each() -> Iterator[T]:
            for item in items:
                yield item
                step()

        yield each()


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns: Any = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total)
        yield lambda: bars.advance(task)
