"""Verifies a graph: runs it beside the forward and compares the results bit by bit."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from surgery.errors import SurgeryError, TraceError
from surgery.tracing.example_call import equal
from surgery.transaction.object_contents import copied
from surgery.transaction.user_frames import line_of

__all__ = ["check_forward_runs", "restore_state", "trace_error", "verify"]


def verify(module: nn.Module, base: type[nn.Module], graph: fx.GraphModule, args: tuple, kwargs: dict) -> None:
    """Run the graph and the forward from the same state. Raises `TraceError` if outputs or changed arguments differ."""
    forward: Any = base.forward
    outcomes = []
    for run in (graph, lambda *args, **kwargs: forward(module, *args, **kwargs)):
        arguments = copied(args), copied(kwargs)
        with restore_state(module):
            outcomes.append((run(*arguments[0], **arguments[1]), arguments))
    for index, difference in enumerate(("gives another result than", "leaves its arguments in another state than")):
        if not equal(*(copied(outcome[index]) for outcome in outcomes)):
            raise TraceError(
                f"{base.__name__}.forward can't be held as a graph",
                why=f"the graph {difference} the forward itself: something in it is not seen by tracing",
                fix=_FIX,
            )


@contextmanager
def restore_state(module: nn.Module) -> Iterator[None]:
    """Restore the module's buffers and attributes, and all random states, after the block."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    states = [
        (inner.__dict__, dict(inner.__dict__), dict(inner._buffers), set(inner._non_persistent_buffers_set))
        for inner in module.modules()
        if not isinstance(inner, torch.jit.ScriptModule)  # a traced forward never calls it
    ]
    lists = [
        (value, copy.copy(value))
        for _, state, _, _ in states
        for name, value in state.items()
        if type(value) in (list, dict, set) and name not in _MODULE_STATE
    ]
    numpy = sys.modules.get("numpy")
    random_states = random.getstate(), numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(random_states[0])
        if numpy is not None:
            numpy.random.set_state(random_states[1])
        for state, before, module_buffers, non_persistent in states:
            state.clear()
            state.update(before)
            state["_buffers"].clear()
            state["_buffers"].update(module_buffers)
            state["_non_persistent_buffers_set"].update(non_persistent)  # setting a buffer makes it persistent
        for value, before in lists:
            if _items(value) != _items(before):
                value.clear()
                value.extend(before) if isinstance(value, list) else value.update(before)
        with torch.no_grad():
            for buffer, original in buffers:
                if not torch.equal(buffer, original):
                    buffer.copy_(original)


def _items(value: Any) -> list[Any]:
    """Returns the items of a list, dict or set, by identity."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return [(key, id(item)) for key, item in pairs]


def check_forward_runs(base: Any, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], cause: TraceError) -> None:
    """Raise another `TraceError` if the forward itself fails on the example, without tracing."""
    if isinstance(cause.__cause__, TraceError):
        return  # tracing rejected an operation of the forward, which must not run again
    try:
        with torch.no_grad(), restore_state(module):
            base.forward(module, *copied(args), **copied(dict(kwargs)))
    except Exception as error:
        raise TraceError(
            f"{base.__name__}.forward fails on the example", why=f"{type(error).__name__}: {error}", where=cause.where
        ) from error


def trace_error(error: Exception, base: type[nn.Module]) -> TraceError:
    """Convert an exception to a `TraceError` with the line of the forward that caused it."""
    why = error.what if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}"
    if isinstance(error, SurgeryError) and error.why:
        why = f"{why}: {error.why}"
    where = line_of(error, base.forward)
    return TraceError(f"{base.__name__}.forward can't be held as a graph", where=where, why=why, fix=_FIX)


_FIX = "trace its children instead; rules that do not need its graph work without it"
_MODULE_STATE = frozenset(nn.Module().__dict__)
