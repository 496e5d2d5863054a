"""Warnings about edits that have no effect because of a layer after them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from surgery.errors import SurgeryWarning
from surgery.forward.tape import Layer
from surgery.forward.tape_steps import Ref
from surgery.weaving.base_terms import begin_forward
from surgery.weaving.tape_terms import apply_layer
from surgery.weaving.term_graph import TermGraph
from surgery.weaving.terms import terms_in, value_operands

__all__ = ["warn_of_hidden_edits"]


def warn_of_hidden_edits(graph: TermGraph, layers: Sequence[Layer]) -> None:
    """Warn about each edit that has no effect on the result because of a layer after it."""
    reached = _reached(graph) if len(layers) > 1 else set()
    for index, layer in enumerate(layers[:-1]):
        if all(id(term) in reached for term in graph.replacements[index]):
            continue
        count = _hidden_by(graph, layers, index)
        if count is not None:
            other = layers[count]
            text = (
                f"{layer.label} [{layer.adapter}] and {other.label} [{other.adapter}] are live on one "
                f"{graph.own.base.__name__}, and an edit of the first has no effect: the second puts a value in the "
                "place of an operation that uses it; make one of them live at a time, or apply them in the other "
                "order"
            )
            warnings.warn(text, SurgeryWarning, stacklevel=3)


def _reached(graph: TermGraph) -> set[int]:
    """Returns the ids of all terms that the output or an effect depends on."""
    reached: set[int] = set()
    waiting = [*terms_in(graph.current[Ref("output", "")]), *graph.effects]
    while waiting:
        term = waiting.pop()
        if id(term) not in reached:
            reached.add(id(term))
            waiting += terms_in((value_operands(term), term.kwargs))
    return reached


def _hidden_by(graph: TermGraph, layers: Sequence[Layer], index: int) -> int | None:
    """Returns the position of the first layer that leaves out an edit of the layer at `index`, or None."""
    most = -1
    for count in range(index + 1, len(layers) + 1):
        fewer = begin_forward(graph.own, graph.training)
        for layer in layers[:count]:
            apply_layer(fewer, layer)
        reached = _reached(fewer)
        number = sum(id(term) in reached for term in fewer.replacements[index])
        if number < most:
            return count - 1
        most = number
    return None
