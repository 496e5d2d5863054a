"""Exports of several threads run one after the other: exporters patch functions of the whole process."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["in_turn"]

P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.RLock()


def in_turn(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run by one thread at a time; one that is called inside of another runs at once."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with _lock:
            return function(*args, **kwargs)

    return called
