"""Traces the own forward of any module as an fx graph, guided by the values of one real call.

The forward runs once more on real tensors, on a view of the module (`surgery.tracing.proxies`), while a
TorchFunctionMode records every torch function; nothing is patched. Sizes are tracked numbers
(`surgery.tracing.tracked_numbers`), so the graph computes them. A decision of Python on a size, a setting or an
argument becomes a guard. Children are one node each. Tracing rejects decisions on the content of tensors and values
that the graph cannot reproduce: a graph is either right or not created. At the end, the graph and the forward run side
by side, and their results must have the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from surgery.errors import TraceError
from surgery.tracing.call_writer import Calls
from surgery.tracing.depth import LAYERS, Depth
from surgery.tracing.example_call import arguments
from surgery.tracing.recorder import Recorder
from surgery.tracing.state_restoration import restore_state
from surgery.tracing.verification import check_forward_runs, trace_error, verify

__all__ = ["trace", "traced"]


def trace(module: nn.Module, example_inputs: Any, *, leaves: bool = True) -> fx.GraphModule:
    """Trace a module's own forward as a graph for calls like the example. Children are `call_module` nodes.

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

    Args:
        module: The module. It is not changed.
        example_inputs: Inputs of one call of this module: a tensor, a tuple of arguments, or a dict of keyword
            arguments.
        leaves: Whether a function from a registry, such as an attention by its name, is one node. With False, the
            graph contains its operations. Default True.

    Returns:
        The graph for the module's present mode, with the bits of the forward on the example. It shares parameters and
        children with the module. Sizes are free unless the forward decides on them. At each call, the graph checks the
        decisions on sizes, settings and arguments, and raises `TraceError` if one would be different.

    Raises:
        TraceError: The forward can't be traced; the error has the file, line and source text. Reasons are decisions on
            the content of tensors (`.item()`, `if x.sum() > 0`), state on the module, and tensors from outside.
    """
    return traced(module, *arguments(example_inputs), depth=Depth(leaves))


def traced(
    module: nn.Module, args: tuple, kwargs: Mapping[str, Any], calls: Calls | None = None, depth: Depth = LAYERS
) -> fx.GraphModule:
    """Implements `trace` for args and kwargs. `calls` collects every call of a child with copies of its arguments."""
    base: type[nn.Module] = getattr(module, "_surgery_base", type(module))
    if type(module) is not base:
        raise TraceError(
            f"this {base.__name__} is rewritten by rules, so its own forward does not run",
            fix="trace a module that contains it, in which it is one node with its adapters; or remove them first",
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError(
            f"this {getattr(module, 'original_name', base.__name__)} is a TorchScript module",
            why="it is compiled and does not have a Python forward that could be traced",
            fix="load its weights into the Python module that it was compiled from",
        )
    # With gradients, so that the forward's own torch.no_grad blocks are visible. If the forward reads the gradient mode
    # (nn.TransformerEncoderLayer has a fast path without gradients), the graph is only for the present mode.
    try:
        return _trace_verified(module, base, args, kwargs, True, calls, depth)
    except TraceError:
        if torch.is_grad_enabled():
            raise
        return _trace_verified(module, base, args, kwargs, False, calls, depth)


def _trace_verified(
    module: nn.Module,
    base: type[nn.Module],
    args: tuple,
    kwargs: Mapping[str, Any],
    gradients: bool,
    calls: Calls | None,
    depth: Depth,
) -> fx.GraphModule:
    if calls is not None:
        calls.clear()
    try:
        with torch.set_grad_enabled(gradients), restore_state(module):
            graph = Recorder(module, base, not gradients, calls, depth).record(args, kwargs)
        verify(module, base, graph, args, dict(kwargs))
    except TraceError as error:
        check_forward_runs(base, module, args, kwargs, error)
        raise
    except Exception as error:  # the graph can't be written, or it fails and the forward does not
        raise trace_error(error, base) from error
    return graph
