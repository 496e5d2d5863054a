"""The own forward of any module as an fx graph, guided by the values of one real call.

The forward is run once more on real tensors, on a view of the module (`surgery.tracing.proxies`), while every torch
function is seen on its way (TorchFunctionMode); nothing is patched. Sizes are tracked numbers
(`surgery.tracing.tracked_numbers`), so they stay computed; what Python decides on a size, a setting or an argument
becomes a guard. Children are one node each. What would depend on the content of tensors is refused, and so is
everything that did not come from where a graph can get it again: a graph is right or it is not made. At the end it is
run beside the forward itself and has to give its bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from surgery.errors import TraceError
from surgery.tracing.call_writer import Calls
from surgery.tracing.example_call import arguments
from surgery.tracing.recorder import Recorder
from surgery.tracing.verification import check_runs, refusal, undone, verify

__all__ = ["trace", "traced"]


def trace(module: nn.Module, example_inputs: Any, *, leaves: bool = True) -> fx.GraphModule:
    """The module's own forward as a graph, its children `call_module` leaves, for calls like this one.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import trace
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
    ...     def forward(self, x, scale=None):
    ...         y = self.down(self.up(x).relu())
    ...         return x + y if scale is None else x + y * scale
    >>> graph = trace(Block(), torch.randn(2, 4))
    >>> [node.target for node in graph.graph.nodes if node.op == "call_module"]
    ['up', 'down']
    >>> graph(torch.randn(3, 4), scale=2.0)
    Traceback (most recent call last):
        ...
    surgery.errors.TraceError: this graph is for calls with scale as None; here it is 2.0
      fix:   trace the module with this call as example_inputs

    `example_inputs`: a tensor, a tuple of arguments or a dict of keyword arguments of this module. The graph is of
    the module's present mode, and has the bits of the forward on the example. Sizes stay free where the forward only
    computes with them; where it decided on one, on a setting or on an argument, the graph checks that it would decide
    so again, and raises `TraceError` if not. Functions looked up in a registry, such as an attention by its name, are
    one node each; with `leaves=False`, what they do. Parameters and children are shared with the module, which is
    untouched.

    Raises `TraceError` with file, line and source text of what can't be held: decisions on the content of tensors
    (`.item()`, `if x.sum() > 0`), state that the forward keeps on the module, tensors from outside it.
    """
    return traced(module, *arguments(example_inputs), leaves=leaves)


def traced(
    module: nn.Module, args: tuple, kwargs: Mapping[str, Any], calls: Calls | None = None, leaves: bool = True
) -> fx.GraphModule:
    """`trace`, given the call's arguments.

    `calls` gets every call of a child, with copies of its arguments. Without `leaves`, functions looked up in a
    registry are gone through rather than one node each.
    """
    base: type[nn.Module] = getattr(module, "_surgery_base", type(module))
    if type(module) is not base:
        raise TraceError(
            f"this {base.__name__} is rewritten by rules, and its own forward is not what runs",
            fix="trace what it is part of, where it is one node with its adapters; or remove them first",
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError(
            f"this {getattr(module, 'original_name', base.__name__)} is a TorchScript module",
            why="it is compiled already: there is no Python forward that could be run and seen",
            fix="load its weights into the Python code that it was made from",
        )
    # With gradients, so that a region of the forward's own torch.no_grad shows. Where the forward looks at the mode
    # itself (nn.TransformerEncoderLayer has a fast path without), the graph is for the present mode alone.
    try:
        return _proven(module, base, args, kwargs, True, calls, leaves)
    except TraceError:
        if torch.is_grad_enabled():
            raise
        return _proven(module, base, args, kwargs, False, calls, leaves)


def _proven(
    module: nn.Module,
    base: type[nn.Module],
    args: tuple,
    kwargs: Mapping[str, Any],
    gradients: bool,
    calls: Calls | None,
    leaves: bool,
) -> fx.GraphModule:
    if calls is not None:
        calls.clear()
    try:
        with torch.set_grad_enabled(gradients), undone(module):
            graph = Recorder(module, base, not gradients, calls, leaves).record(args, kwargs)
        verify(module, base, graph, args, dict(kwargs))
    except TraceError as error:
        check_runs(base, module, args, kwargs, error)
        raise
    except Exception as error:  # a graph that can't be written, or fails where the forward does not
        raise refusal(error, base) from error
    return graph
