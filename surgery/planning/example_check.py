"""Checks on an example call: a traced graph gives its module's bits, and no rewrite repeats a forward that writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from surgery.errors import SurgeryError, TraceError
from surgery.forward.own_forward import OwnForward
from surgery.forward.repeated_runs import find_write, repeat_forward, repeated_write_error
from surgery.forward.tape import Layer
from surgery.tracing.example_call import equal, evaluating
from surgery.transaction.neutral_context import ambient
from surgery.transaction.object_contents import copied
from surgery.weaving.weave import weave

__all__ = []


def verify_graph(module: nn.Module, own: OwnForward, call: tuple[tuple, dict, Any], path: str) -> None:
    """Run the graph without edits on the arguments of a call; `TraceError` unless it gives the forward's bits.

    The forward runs again by itself, since hooks may have changed the output that the example call recorded.
    """
    if "forward" in module.__dict__:
        return  # accelerate's hooks wrap the forward and may move its inputs to another device first
    args, kwargs, _ = call
    bound = own.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    graph = fx.GraphModule(module, weave(own, [], training=False))
    with ambient(), torch.no_grad(), evaluating(module):
        with torch.random.fork_rng():
            output = graph(*copied(tuple(bound.arguments.values())))
        with torch.random.fork_rng():
            expected = own.base.forward(module, *copied(args), **copied(kwargs))
    if not equal(output, expected):
        raise TraceError(
            f"the graph of {own.base.__name__}.forward gives another result than the forward itself",
            where=path,
            why="tracing does not see something in the forward",
            fix="report the module; until then, target another one",
        )


def repeated_write(
    module: nn.Module, own: OwnForward, layer: Layer, call: tuple[tuple, dict, Any], path: str
) -> SurgeryError | None:
    """The problem if the edits run the module's own forward more than once and it writes to its arguments or module."""
    total = sum(node.target is repeat_forward for node in weave(own, [layer], training=False).nodes)
    if total < 2:
        return None
    with torch.no_grad(), torch.random.fork_rng(), evaluating(module):
        place = find_write(module, copied(call[0]), copied(call[1]))
    return None if place is None else repeated_write_error(module, total, place, where=path)
