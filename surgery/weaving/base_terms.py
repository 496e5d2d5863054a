"""Creates the terms with which weaving begins: those of a site's own forward, or only its output."""

from __future__ import annotations

from typing import Any

from torch import fx

from surgery.forward.own_forward import OwnForward
from surgery.forward.tape import Tape
from surgery.forward.tape_steps import Ref
from surgery.tracing.fx_args import replace_nodes
from surgery.weaving.own_calls import call_opaque
from surgery.weaving.tape_terms import play
from surgery.weaving.term_graph import OUTPUT, TermGraph
from surgery.weaving.terms import Term, terms_in

__all__ = ["begin_at_output", "begin_forward"]


def begin_forward(own: OwnForward, training: bool) -> TermGraph:
    """Returns the terms of the own forward."""
    graph = TermGraph(own, training)
    if own.graph is not None:
        _note_effects(graph, _add_operations(graph, own.graph))
    elif own.tapes is None:
        graph.call = call_opaque(graph, {}, {})
        graph.current[Ref("output", "")] = graph.call
    else:
        _note_effects(graph, _play_base(graph, own.tapes[training]))
    graph.current[Ref("base", "")] = graph.current[Ref("output", "")]
    graph.outputs.append(graph.current[Ref("output", "")])
    return graph


def _play_base(graph: TermGraph, tape: Tape) -> list[Term]:
    played = play(graph, tape, "", "")
    for index, term in enumerate(played):
        term.place = (index, 0, 0)
    return played


def begin_at_output(own: OwnForward, training: bool) -> TermGraph:
    """Returns the terms of a forward whose input is the own forward's output."""
    graph = TermGraph(own, training)
    graph.current[Ref("output", "")] = graph.current[Ref("base", "")] = graph.leading_input(OUTPUT)
    return graph


def _add_operations(graph: TermGraph, traced: fx.Graph) -> list[Term]:
    """Add the operations of a traced graph. Rules refer to each as ("inside", the name of its node)."""
    terms: dict[fx.Node, Any] = {}
    for node in traced.nodes:
        args, kwargs = replace_nodes(node.args, terms.__getitem__), replace_nodes(node.kwargs, terms.__getitem__)
        if node.op == "output":
            graph.current[Ref("output", "")] = args[0]
            continue
        if node.op == "placeholder":
            terms[node] = graph.current[Ref("input", str(node.target).lstrip("*"))]
        elif node.op == "get_attr" and str(node.target).startswith("_kept_"):
            terms[node] = graph.add_constant(str(node.target))
        elif node.op == "get_attr":
            terms[node] = graph.read_state(graph.current, str(node.target))
        else:
            terms[node] = graph.add_term(node.op, node.target, args, kwargs)
            graph.places[node.name] = len(graph.places)
            terms[node].place = (graph.places[node.name], 0, 0)
            graph.current[Ref("made", node.name)] = terms[node]
        graph.current[Ref("inside", node.name)] = terms[node]
    return [term for node, term in terms.items() if node.op.startswith("call_")]


def _note_effects(graph: TermGraph, candidates: list[Term]) -> None:
    """Note the terms that must run: those that write in place, and those whose result nothing uses."""
    unused = {id(term) for term in _unused(graph, candidates)}
    graph.effects += [term for term in candidates if id(term) in unused or term.writes]


def _unused(graph: TermGraph, candidates: list[Term]) -> list[Term]:
    used = {id(inner) for term in graph.terms for inner in terms_in((term.args, term.kwargs))}
    used |= {id(term) for term in terms_in(graph.current[Ref("output", "")])}
    return [term for term in candidates if id(term) not in used]
