"""All or nothing: what is done to a model is written down with its inverse, and undone when anything fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Journal"]


class Journal:
    """A context in which each change notes how to undo it; on an exception the changes are undone, last first.

    >>> from surgery.journal import Journal
    >>> numbers = [1]
    >>> try:
    ...     with Journal() as journal:
    ...         numbers.append(2)
    ...         journal.undo(numbers.pop)
    ...         raise ValueError
    ... except ValueError:
    ...     print(numbers)
    [1]
    """

    def __init__(self) -> None:
        self._undo: list[tuple[Callable[..., Any], tuple]] = []

    def undo(self, function: Callable[..., Any], *args: Any) -> None:
        self._undo.append((function, args))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            for function, args in reversed(self._undo):
                function(*args)
        self._undo.clear()
