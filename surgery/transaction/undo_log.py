"""All or nothing: what is done to a model is written down with its inverse, and undone when anything fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

__all__ = ["ABSENT", "Journal"]

ABSENT: Any = object()  # the value of an attribute or key that is not there


class Journal:
    """A context in which each change notes how to undo it; on an exception the changes are undone, last first.

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

    A change is noted before it is made, and undoing it twice, or before it was made, does no harm: an interrupt may
    come between any two lines. An inverse that fails does not keep the others from being run: the error that is
    underway gets a note for each. A journal that is opened inside of another is an entry of that one, so a verb that is
    made of verbs is undone as a whole.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[Callable[..., Any], tuple] | Journal] = []
        self._outer: Journal | None = None

    def undo(self, function: Callable[..., Any], *args: Any) -> None:
        self._undo.append((function, args))

    def keep(self, *held: dict[Any, Any] | list[Any] | set[Any]) -> None:
        """Note what these hold now, and in which order."""
        for one in held:
            self._undo.append((_refill, (one, one.copy())))

    def attribute(self, owner: Any, name: str) -> None:
        """Note an attribute that is about to be set."""
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
                except BaseException as pressed:  # a key pressed meanwhile: the undoing goes on, then it counts
                    interrupt = pressed
                    if again:
                        continue
                break
            self._undo.pop()
        if interrupt is not None:
            raise interrupt


class _Open(threading.local):
    journal: Journal | None = None


_open = _Open()


def _refill(held: Any, was: Any) -> None:
    if isinstance(held, list):
        held[:] = was
    elif isinstance(held, set):
        held.intersection_update(was)
        held.update(was)
    else:
        for key in held.keys() - was.keys():
            del held[key]
        held.update(was)
        if list(held) != list(was):
            held.clear()
            held.update(was)


def _set_again(owner: Any, name: str, own: Any, value: Any) -> None:
    if own is not ABSENT:
        owner.__dict__[name] = own
    elif name in owner.__dict__:
        del owner.__dict__[name]
    elif value is not ABSENT and getattr(owner, name, ABSENT) is not value:
        setattr(owner, name, value)  # a property's
