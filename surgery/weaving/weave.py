"""Tapes → one fx graph: the site's own forward with the edits of every live rule woven in.

The edits are applied to a small graph of terms first and written as fx nodes last. What a rule put something else in
the place of stays where it is still needed and is left out where nothing needs it, so no fx node is ever erased, moved
or re-inserted.

Every term has a place in the program. Operations of the forward keep their order. A line of a rewrite stands right
after the values that it uses are made: inputs are there at the beginning, an operand of a match where the match ends,
the output at the end, and so is all that is written after `site.output` was asked for. Lines of a rewrite that writes
in place keep their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from surgery.forward.own_forward import OwnForward, record_own
from surgery.forward.tape import Layer
from surgery.weaving.base_terms import begin_at_output, begin_forward
from surgery.weaving.fx_writing import write_graph
from surgery.weaving.hidden_edits import warn_of_hidden_edits
from surgery.weaving.lowering import lower
from surgery.weaving.tape_terms import apply_layer
from surgery.weaving.term_graph import TermGraph

__all__ = ["trace_site", "woven", "woven_edit", "woven_held"]


def woven(own: OwnForward, layers: Sequence[Layer], training: bool, lowered: bool = True) -> fx.Graph:
    """The graph of the site's forward with the layers' edits, in training or evaluation mode.

    `lowered=False` keeps the rules' own form, without the fast forms of `surgery.weaving.lowering`. Raises `SiteError`
    where an edit would need a value before it is made.
    """
    terms = _terms_with(begin_forward(own, training), layers)
    graph = write_graph(terms)
    warn_of_hidden_edits(terms, layers)
    if lowered:
        lower(graph)
    return graph


def woven_held(own: OwnForward, layers: Sequence[Layer]) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph of a forward that is held as operations, with the layers' edits inside it; and the functions it keeps.

    Its first input, before the forward's own, is the mapping of what the graph keeps.
    """
    terms = _terms_with(begin_forward(own, False), layers)
    graph = write_graph(terms)
    warn_of_hidden_edits(terms, layers)
    return graph, terms.kept


def woven_edit(own: OwnForward, layers: Sequence[Layer], training: bool) -> fx.Graph:
    """What the layers make of a site's output, as a graph of its own; its first input, before the forward's, is that
    output."""
    return write_graph(_terms_with(begin_at_output(own, training), layers))


def _terms_with(terms: TermGraph, layers: Sequence[Layer]) -> TermGraph:
    for layer in layers:
        apply_layer(terms, layer)
    return terms


def trace_site(module: nn.Module) -> fx.GraphModule:
    """The module's own forward as a graph; its children are `call_module` leaves, its parameters shared.

    >>> from torch import nn
    >>> from surgery import trace_site
    >>> print(trace_site(nn.Linear(2, 3)).code.strip())
    def forward(self, input):
        input_1 = input
        weight = self.weight
        bias = self.bias
        linear = torch._C._nn.linear(input_1, weight, bias);  input_1 = weight = bias = None
        return linear

    The graph is of the module's present mode, training or evaluation; arguments that have a default are fixed to
    it. Raises `TraceError` with the file, line and text of the construct that can't be held in a graph.
    """
    own = record_own(module)
    return fx.GraphModule(module, woven(own, [], module.training), own.base.__name__)
