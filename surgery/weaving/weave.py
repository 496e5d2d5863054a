"""Tapes → one fx graph: the site's own forward with the edits of every live rule woven in.

The edits are applied to a small graph of terms, which is then written as fx nodes. A replaced value is kept while
anything still uses it and left out otherwise, so no fx node is ever erased, moved or inserted again.

Every term has a place in the program. Operations of the forward keep their order. A line of a rewrite is placed right
after the last of its operands: inputs at the beginning, an operand of a match at the end of the match, the output at
the end. Lines after the first use of `site.output` are placed at the end, too. Lines of a rewrite that writes in place
keep their order.
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

__all__ = ["trace_site", "weave", "weave_edit", "weave_traced"]


def weave(own: OwnForward, layers: Sequence[Layer], training: bool, lowered: bool = True) -> fx.Graph:
    """Returns the graph of a site's forward with the layers' edits, in training or evaluation mode.

    `lowered=False` keeps the rules' own form, without the fast forms of `surgery.weaving.lowering`. Raises `SiteError`
    if an edit needs a value before it is computed.
    """
    terms = _terms_with(begin_forward(own, training), layers)
    graph = write_graph(terms)
    warn_of_hidden_edits(terms, layers)
    if lowered:
        lower(graph)
    return graph


def weave_traced(own: OwnForward, layers: Sequence[Layer]) -> tuple[fx.Graph, dict[str, Any]]:
    """Returns the graph of a traced forward with the layers' edits, and the functions that the edits wrap.

    The graph's first input, before the forward's own inputs, is the mapping of its constants.
    """
    terms = _terms_with(begin_forward(own, False), layers)
    graph = write_graph(terms)
    warn_of_hidden_edits(terms, layers)
    return graph, terms.constants


def weave_edit(own: OwnForward, layers: Sequence[Layer], training: bool) -> fx.Graph:
    """Returns the layers' edits of a site's output as a graph. Its first input is the output of the own forward."""
    return write_graph(_terms_with(begin_at_output(own, training), layers))


def _terms_with(terms: TermGraph, layers: Sequence[Layer]) -> TermGraph:
    for layer in layers:
        apply_layer(terms, layer)
    return terms


def trace_site(module: nn.Module) -> fx.GraphModule:
    """Return the module's own forward as a graph. Its children are `call_module` leaves; its parameters are shared.

    >>> from torch import nn
    >>> from surgery import trace_site
    >>> print(trace_site(nn.Linear(2, 3)).code.strip())
    def forward(self, input):
        input_1 = input
        weight = self.weight
        bias = self.bias
        linear = torch._C._nn.linear(input_1, weight, bias);  input_1 = weight = bias = None
        return linear

    The graph shows the module's present mode, training or evaluation. Arguments with a default are fixed to it.

    Args:
        module: the module. Its class and parameters do not change.

    Returns:
        The graph with the module's parameters and children.

    Raises:
        TraceError: The forward contains a construct that a graph can't represent. The error shows its file and line.
    """
    own = record_own(module)
    return fx.GraphModule(module, weave(own, [], module.training), own.base.__name__)
