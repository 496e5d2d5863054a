"""Guards the live adapters of a model: while a block of `using` or `route` is open, other changes raise an error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from surgery.errors import SurgeryError

__all__ = ["check_free", "check_unclaimed", "claim", "routing"]


@contextmanager
def claim(model: nn.Module) -> Iterator[None]:
    """Inside the block, only this thread may change the model. Blocks of one thread may be nested."""
    thread = threading.get_ident()
    with _lock:
        check_free(model)
        depth = _owners.get(model, (thread, 0))[1]
        _owners[model] = (thread, depth + 1)
    try:
        try:
            yield
        finally:
            _disown(model, thread, depth)
    finally:  # again, in case an interrupt stopped it
        _disown(model, thread, depth)


@contextmanager
def routing(model: nn.Module) -> Iterator[None]:
    """Inside the block, no thread may change the model. Several threads may be inside at once."""
    block = object()
    with _lock:
        _check_owner(model)
        _routed[model] = _routed.get(model, frozenset()) | {block}
    try:
        try:
            yield
        finally:
            _unroute(model, block)
    finally:  # again, in case an interrupt stopped it
        _unroute(model, block)


def _disown(model: nn.Module, thread: int, depth: int) -> None:
    """Leave a block that is nested in `depth` others of the thread."""
    with _lock:
        if _owners.get(model, (None, 0))[0] != thread:
            return
        if depth:
            _owners[model] = (thread, depth)
        else:
            del _owners[model]


def _unroute(model: nn.Module, block: object) -> None:
    with _lock:
        remaining = _routed.get(model, frozenset()) - {block}
        if remaining:
            _routed[model] = remaining
        else:
            _routed.pop(model, None)


def check_free(model: nn.Module) -> None:
    """Raise `SurgeryError` if this thread may not change the model now."""
    _check_owner(model)
    if model in _routed:
        raise SurgeryError(
            "the model's adapters are routed",
            why="a block of route(model, …) is open, in this thread or another, and needs the present adapters",
            fix="leave the block first",
        )


def check_unclaimed(model: nn.Module) -> None:
    """Raise `SurgeryError` while any block is open, also in this thread: leaving it activates adapters by name."""
    check_free(model)
    if model in _owners:
        why = "leaving the block activates the previous adapters by their names"
        raise SurgeryError("a block of using(model, …) is open", why=why, fix="leave the block first")


def _check_owner(model: nn.Module) -> None:
    owner = _owners.get(model)
    if owner is not None and owner[0] != threading.get_ident():
        raise SurgeryError(
            "another thread is using adapters of this model",
            why="a model has one set of live adapters for all threads",
            fix="wait for it, give each thread a copy of the model, or route rows to adapters in each thread: route",
        )


_lock = threading.RLock()
_owners: WeakKeyDictionary[nn.Module, tuple[int, int]] = WeakKeyDictionary()
_routed: WeakKeyDictionary[nn.Module, frozenset[object]] = WeakKeyDictionary()  # the blocks that are open
