"""The proof of a graph: run beside the forward itself, and what is said where it can't be held."""

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
from surgery.tracing.example_call import copied, equal
from surgery.transaction.user_frames import line_of

__all__ = ["check_runs", "refusal", "undone", "verify"]


def verify(module: nn.Module, base: type[nn.Module], graph: fx.GraphModule, args: tuple, kwargs: dict) -> None:
    """Run the graph and the forward from the same state: outputs, and what becomes of the arguments, must be equal."""
    own: Any = base.forward
    outcomes = []
    for run in (graph, lambda *args, **kwargs: own(module, *args, **kwargs)):
        given = copied(args), copied(kwargs)
        with undone(module):
            outcomes.append((run(*given[0], **given[1]), given))
    for index, told in enumerate(("gives another result than", "leaves its arguments in another state than")):
        if not equal(*(copied(outcome[index]) for outcome in outcomes)):
            raise TraceError(
                f"{base.__name__}.forward can't be held as a graph",
                why=f"the graph {told} the forward itself: something in it is not seen by tracing",
                fix=_FIX,
            )


@contextmanager
def undone(module: nn.Module) -> Iterator[None]:
    """Running the module leaves no trace: on buffers, instances, and what draws random numbers."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    states = [
        (inner.__dict__, dict(inner.__dict__), dict(inner._buffers), set(inner._non_persistent_buffers_set))
        for inner in module.modules()
        if not isinstance(inner, torch.jit.ScriptModule)  # called by no forward that is traced
    ]
    lists = [
        (value, copy.copy(value))
        for _, state, _, _ in states
        for name, value in state.items()
        if type(value) in (list, dict, set) and name not in _TORCHS
    ]
    numpy = sys.modules.get("numpy")
    drawn = random.getstate(), numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(drawn[0])
        if numpy is not None:
            numpy.random.set_state(drawn[1])
        for state, before, held, passing in states:
            state.clear()
            state.update(before)
            state["_buffers"].clear()
            state["_buffers"].update(held)
            state["_non_persistent_buffers_set"].update(passing)  # setting a buffer makes it persistent
        for value, before in lists:
            if _items(value) != _items(before):
                value.clear()
                value.extend(before) if isinstance(value, list) else value.update(before)
        with torch.no_grad():
            for buffer, kept in buffers:
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)


def _items(value: Any) -> list[Any]:
    """What is in a list, dict or set, by identity."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return [(key, id(item)) for key, item in pairs]


def check_runs(base: Any, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], refused: TraceError) -> None:
    """Say so where it is the forward itself that fails on the example."""
    if isinstance(refused.__cause__, TraceError):
        return  # refused for what it does: it is not to do that again
    try:
        with torch.no_grad(), undone(module):
            base.forward(module, *copied(args), **copied(dict(kwargs)))
    except Exception as error:
        raise TraceError(
            f"{base.__name__}.forward fails on the example", why=f"{type(error).__name__}: {error}", where=refused.where
        ) from error


def refusal(error: Exception, base: type[nn.Module]) -> TraceError:
    why = error.what if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}"
    if isinstance(error, SurgeryError) and error.why:
        why = f"{why}: {error.why}"
    where = line_of(error, base.forward)
    return TraceError(f"{base.__name__}.forward can't be held as a graph", where=where, why=why, fix=_FIX)


_FIX = "its children can be traced by themselves; rules that need no graph of it work all the same"
_TORCHS = frozenset(nn.Module().__dict__)
