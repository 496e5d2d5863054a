"""The undo log: it records the inverse of each change of a model, and undoes the changes after a failure."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

__all__ = ["ABSENT", "Journal", "Trial", "refill"]

ABSENT: Any = object()  # the value of a missing attribute or key


class Journal:
    """A context that records how to undo each change. An exception undoes the changes, last first.

    >>> from surgery.transaction.undo_log import Journal
    >>> numbers = [1]
    >>> try:
    ...     with Journal() as journal:
    ...         journal.keep(numbers)
    ...         numbers.append(2)
    ...         raise ValueError
    ... except ValueError:
    ...     print(numbers)
    [1]

    A change is noted before it is made. Undoing it twice, or before it was made, is harmless, because an interrupt may
    come between any two lines. If an inverse fails, the others still run, and the exception gets a note for each
    failure. A journal inside another journal is an entry of the outer one, so a verb that calls verbs is undone as a
    whole.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[Callable[..., Any], tuple] | Journal] = []
        self._outer: Journal | None = None

    def undo(self, function: Callable[..., Any], *args: Any) -> None:
        """Note that `function(*args)` undoes the next change."""
        self._undo.append((function, args))

    def keep(self, *containers: dict[Any, Any] | list[Any] | set[Any]) -> None:
        """Note the present items of containers, with their order."""
        for container in containers:
            self._undo.append((refill, (container, container.copy())))

    def attribute(self, owner: Any, name: str) -> None:
        """Note the present value of an attribute before it is set."""
        self._undo.append((_set_again, (owner, name, owner.__dict__.get(name, ABSENT), getattr(owner, name, ABSENT))))

    def __enter__(self) -> Journal:
        self._outer = _open.journal
        if self._outer is not None:
            self._outer._undo.append(self)
        _open.journal = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        _open.journal, outer, self._outer = self._outer, self._outer, None
        if error is not None:
            self._roll_back(error)
        elif outer is None:
            self._undo = []

    def _roll_back(self, error: BaseException) -> None:
        interrupt: BaseException | None = None
        while self._undo:
            last = self._undo[-1]
            for again in (True, False):
                try:
                    if isinstance(last, Journal):
                        last._roll_back(error)
                    else:
                        last[0](*last[1])
                except Exception as failed:
                    error.add_note(f"undoing failed: {type(failed).__name__}: {failed}")
                except BaseException as pressed:  # a keyboard interrupt: finish undoing, then raise it
                    interrupt = pressed
                    if again:
                        continue
                break
            self._undo.pop()
        if interrupt is not None:
            raise interrupt


class Trial(Journal):
    """A journal that undoes its changes always, also without an exception: for a look at a changed model."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        super().__exit__(kind, error if error is not None else _TrialEnd(), *rest)


class _TrialEnd(Exception):
    """Takes the notes about inverses that failed."""


class _Open(threading.local):
    journal: Journal | None = None


_open = _Open()


def refill(container: Any, items: Any) -> None:
    """Give a list, dict or set the same items again, by identity. What did not change is not written."""
    if isinstance(container, list):
        if list(map(id, container)) != list(map(id, items)):
            container[:] = items
    elif isinstance(container, set):
        container.intersection_update(items)
        container.update(items)
    else:
        for key in container.keys() - items.keys():
            del container[key]
        for key, value in items.items():
            if key not in container or container[key] is not value:
                container[key] = value
        if list(container) != list(items):
            container.clear()
            container.update(items)


def _set_again(owner: Any, name: str, own: Any, value: Any) -> None:
    if own is not ABSENT:
        owner.__dict__[name] = own
    elif name in owner.__dict__:
        del owner.__dict__[name]
    elif value is not ABSENT and getattr(owner, name, ABSENT) is not value:
        setattr(owner, name, value)  # a property's
