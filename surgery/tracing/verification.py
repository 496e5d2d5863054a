"""Verifies a graph: runs it beside the forward and compares the results bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from surgery.errors import SurgeryError, TraceError
from surgery.tracing.example_call import equal
from surgery.tracing.state_restoration import restore_state
from surgery.transaction.object_contents import copied
from surgery.transaction.user_frames import line_of

__all__ = ["check_forward_runs", "trace_error", "verify"]


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
