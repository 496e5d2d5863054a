"""Checks on the example: a traced graph gives what its module gives, and no rewrite runs twice what writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from surgery.errors import SurgeryError, TraceError
from surgery.forward.own_forward import OwnForward
from surgery.forward.repeated_runs import refusal, repeated, writes
from surgery.forward.tape import Layer
from surgery.tracing.example_call import copied, equal, evaluating
from surgery.transaction.neutral_context import ambient
from surgery.weaving.weave import woven

__all__ = []


def verify_graph(module: nn.Module, own: OwnForward, given: tuple[tuple, dict, Any], path: str) -> None:
    """Run the un-edited graph on the module's own call; `TraceError` unless it gives the original's bits.

    The original is run once more by itself: hooks may have changed the output that the example call showed.
    """
    if "forward" in module.__dict__:
        return  # accelerate's hooks stand around the forward and may take its inputs to another device first
    args, kwargs, _ = given
    bound = own.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    graph = fx.GraphModule(module, woven(own, [], training=False))
    with ambient(), torch.no_grad(), evaluating(module):
        with torch.random.fork_rng():
            found = graph(*copied(tuple(bound.arguments.values())))
        with torch.random.fork_rng():
            expected = own.base.forward(module, *copied(args), **copied(kwargs))
    if not equal(found, expected):
        raise TraceError(
            f"the graph of {own.base.__name__}.forward gives another result than the forward itself",
            where=path,
            why="something in the forward is not seen by tracing",
            fix="report the module; until then, target another one",
        )


def written_twice(
    module: nn.Module, own: OwnForward, layer: Layer, given: tuple[tuple, dict, Any], path: str
) -> SurgeryError | None:
    """The objection to edits that run the module's own forward more than once, where it writes to what it is given."""
    total = sum(node.target is repeated for node in woven(own, [layer], training=False).nodes)
    if total < 2:
        return None
    with torch.no_grad(), torch.random.fork_rng(), evaluating(module):
        what = writes(module, copied(given[0]), copied(given[1]))
    return None if what is None else refusal(module, total, what, where=path)
