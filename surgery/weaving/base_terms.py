"""The terms with which weaving begins: a site's own forward, or what follows its output."""

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
    """The terms of the own forward."""
    graph = TermGraph(own, training)
    if own.graph is not None:
        _note_effects(graph, _add_operations(graph, own.graph))
    elif own.tapes is None:
        graph.call = call_opaque(graph, {}, {})
        graph.now[Ref("output", "")] = graph.call
    else:
        _note_effects(graph, _play_base(graph, own.tapes[training]))
    graph.now[Ref("base", "")] = graph.now[Ref("output", "")]
    graph.outputs.append(graph.now[Ref("output", "")])
    return graph


def _play_base(graph: TermGraph, tape: Tape) -> list[Term]:
    made = play(graph, tape, "", "")
    for index, term in enumerate(made):
        term.place = (index, 0, 0)
    return made


def begin_at_output(own: OwnForward, training: bool) -> TermGraph:
    """The terms of a forward that gets the own forward's output as an input."""
    graph = TermGraph(own, training)
    graph.now[Ref("output", "")] = graph.now[Ref("base", "")] = graph.before(OUTPUT)
    return graph


def _add_operations(graph: TermGraph, traced: fx.Graph) -> list[Term]:
    """The operations of a traced graph. A rule knows each as ("inside", the name of its node)."""
    terms: dict[fx.Node, Any] = {}
    for node in traced.nodes:
        args, kwargs = replace_nodes(node.args, terms.__getitem__), replace_nodes(node.kwargs, terms.__getitem__)
        if node.op == "output":
            graph.now[Ref("output", "")] = args[0]
            continue
        if node.op == "placeholder":
            terms[node] = graph.now[Ref("input", str(node.target).lstrip("*"))]
        elif node.op == "get_attr" and str(node.target).startswith("_kept_"):
            terms[node] = graph.kept_function(str(node.target))
        elif node.op == "get_attr":
            terms[node] = graph.state(graph.now, str(node.target))
        else:
            terms[node] = graph.term(node.op, node.target, args, kwargs)
            graph.places[node.name] = len(graph.places)
            terms[node].place = (graph.places[node.name], 0, 0)
            graph.now[Ref("made", node.name)] = terms[node]
        graph.now[Ref("inside", node.name)] = terms[node]
    return [term for node, term in terms.items() if node.op.startswith("call_")]


def _note_effects(graph: TermGraph, made: list[Term]) -> None:
    """Note what runs for what it does: what writes in place, and what nobody uses."""
    unused = {id(term) for term in _unused(graph, made)}
    graph.effects += [term for term in made if id(term) in unused or term.writes]


def _unused(graph: TermGraph, made: list[Term]) -> list[Term]:
    used = {id(inner) for term in graph.terms for inner in terms_in((term.args, term.kwargs))}
    used |= {id(term) for term in terms_in(graph.now[Ref("output", "")])}
    return [term for term in made if id(term) not in used]
