"""Adds calls of a site's own forward as terms. An opaque forward is one term; a tape is repeated step by step."""

from __future__ import annotations

from typing import Any

from surgery.forward.parameter_view import base_forward
from surgery.forward.tape_steps import Ref, thaw
from surgery.forward.unnamed_inputs import FIRST
from surgery.weaving.term_graph import TermGraph
from surgery.weaving.terms import Term, node_parts

__all__ = ["call_opaque", "repeat_own"]


def call_opaque(graph: TermGraph, inputs: dict[str, Any], tensors: dict[str, Any], origin: str = "") -> Term:
    """Add the call of an opaque forward, with replaced inputs and tensors."""
    positional, more, named, extra = [], (), {}, {}
    if FIRST in inputs:
        inputs = {**inputs, **graph.with_first(inputs[FIRST], origin)}
    starred = any(p.kind is p.VAR_POSITIONAL for p in graph.own.signature.parameters.values())
    for name, parameter in graph.own.signature.parameters.items():
        value = inputs.get(name, graph.current[Ref("input", name)])
        if parameter.kind is parameter.VAR_POSITIONAL:
            more = value
        elif parameter.kind is parameter.VAR_KEYWORD:
            extra = value
        elif parameter.kind is parameter.KEYWORD_ONLY:
            named[name] = value
        elif (
            parameter.default is not parameter.empty
            and not starred
            and graph.own.names_hold
            and parameter.kind is not parameter.POSITIONAL_ONLY
        ):
            named[name] = value  # decorators of forwards (in transformers) read options from the keywords
        else:
            positional.append(value)
    itself = graph.add_term("get_attr", "_surgery_self")
    return graph.add_term(
        "call_function", base_forward, (itself, tensors, tuple(positional), more, named, extra), origin=origin
    )


def repeat_own(graph: TermGraph, inputs: dict[str, Any], tensors: dict[str, Any], origin: str) -> Any:
    """Add the site's own operation again, with other inputs or tensors. Returns its output."""
    if graph.own.tapes is None:
        return call_opaque(graph, inputs, tensors, origin)
    ops: dict[str | int, Any] = {}
    output = None

    def resolve(ref: Ref) -> Any:
        if ref.kind == "op":
            return ops[ref.key]
        replacements = inputs if ref.kind == "input" else tensors
        if ref.key in replacements:
            return replacements[str(ref.key)]
        return graph.read_state(graph.current, str(ref.key)) if ref.kind == "state" else graph.current[ref]

    for index, step in enumerate(graph.own.tapes[graph.training].steps):
        if step.kind == "replace":
            output = thaw(step.args[1], resolve)
        else:
            node = node_parts(step, thaw(step.args, resolve))
            ops[index] = graph.add_term(*node, thaw(step.kwargs, resolve), origin)
    return output
