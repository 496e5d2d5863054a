"""Writes the terms of a forward as an fx graph. Terms that neither the output nor an effect needs are left out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from surgery.errors import SiteError
from surgery.forward.empty_graph import empty_graph
from surgery.forward.parameter_view import base_forward
from surgery.forward.repeated_runs import RunCount, check_skipped_forward, repeat_forward, repeat_method, repeat_module
from surgery.forward.side_effects import draws, is_foreign
from surgery.forward.tape_steps import Ref
from surgery.tracing.decisions import decide
from surgery.weaving.term_graph import CONSTANTS, OUTPUT, ROWS, TermGraph
from surgery.weaving.terms import Term, map_terms, skip_reads, sources_of, terms_in

__all__ = ["write_graph"]


def write_graph(terms: TermGraph) -> fx.Graph:
    """Returns the graph of a forward. Raises `SiteError` if an edit needs a value before it is computed."""
    graph = empty_graph()
    _write_inputs(terms, graph)
    output = terms.current[Ref("output", "")]
    needed = {id(term): term for term in sources_of((output, terms.effects))}
    _count_runs(terms, list(needed.values()))
    if terms.call is not None and id(terms.call) not in needed and len(terms.own.signature.parameters) > 1:
        site, _, *arguments = terms.call.args[:6]
        terms.effects.append(terms.add_term("call_function", check_skipped_forward, (site, *arguments)))
    effects = {id(term): term for term in terms.effects}
    for term in sorted({**needed, **effects}.values(), key=lambda term: term.place):
        if term.op != "get_attr":  # read where it is used
            _write(term, graph, effects)
    _check_order(terms, graph)
    graph.output(map_terms(output, lambda term: _write(term, graph, effects)))
    for value in map(skip_reads, terms.outputs):
        if isinstance(value, Term) and value.node is not None:
            value.node.meta["output"] = True
    return graph


def _write_inputs(terms: TermGraph, graph: fx.Graph) -> None:
    inputs = {term.target: term for term in terms.terms if term.op == "placeholder"}
    for name in (ROWS, OUTPUT, CONSTANTS):
        if name in inputs:
            inputs[name].node = graph.placeholder(name)
        elif name == CONSTANTS and terms.own.graph is not None:
            graph.placeholder(name)
    for name, parameter in terms.own.signature.parameters.items():
        starred = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        inputs[name].node = graph.placeholder(starred + name, default_value=parameter.default)


def _count_runs(terms: TermGraph, needed: list[Term]) -> None:
    """Make calls that edits repeat check that repeating is allowed: of the own forward, a module or an object."""
    same: dict[tuple, list[Term]] = {}
    for term in needed:
        if term.target is base_forward and (term is terms.call or not term.args[1]):
            same.setdefault((base_forward,), []).append(term)
        elif term.op == "call_module" or term.op == "call_method" and not hasattr(Tensor, term.target):
            same.setdefault((term.op, term.target), []).append(term)
    for (kind, *_), runs in same.items():
        origin = next((term.origin for term in runs if term.origin), "")
        if len(runs) < 2 or not origin:  # calls that the forward itself repeats are the model's concern
            continue
        counter = terms.add_term("call_function", RunCount, (len(runs),), origin=origin)
        for term in runs:
            if kind is base_forward:
                term.target, term.args = repeat_forward, (counter, *term.args)
                continue
            path = term.target if kind == "call_module" else "_surgery_self"
            leading = (terms.add_term("get_attr", path), *(() if kind == "call_module" else (term.target,)))
            function = repeat_module if kind == "call_module" else repeat_method
            term.op, term.target = "call_function", function
            term.args, term.kwargs = (counter, *leading, tuple(term.args), term.kwargs), {}


def _check_order(terms: TermGraph, graph: fx.Graph) -> None:
    """Raise `SiteError` if the graph changes the order of the lines of a rewrite that writes in place."""
    index_of = {node: index for index, node in enumerate(graph.nodes)} if terms.ordered else {}
    for origin, terms_of_rewrite in terms.ordered:
        lines = [index_of[term.node] for term in terms_of_rewrite if term.node is not None]
        if lines != sorted(lines):
            raise SiteError(
                f"the lines of {origin or 'the forward'} can't keep the order in which they are written",
                why="it writes in place, and a value is replaced by what is computed after it is used",
                fix="write x + y in the place of x.add_(y), or replace values in the order of the forward",
            )


def _write(term: Term, graph: fx.Graph, effects: Mapping[int, Term]) -> fx.Node:
    """Write a term and all terms that it needs as nodes. Returns the term's node."""
    waiting = [term]  # a stack instead of recursion: each live adapter makes the chain of terms longer
    while waiting:
        current = waiting[-1]
        missing = (
            [] if current.node is not None else [t for t in terms_in((current.args, current.kwargs)) if t.node is None]
        )
        if missing:
            if cyclic := next((other for other in missing if other.in_progress), None):
                raise SiteError(
                    f"{cyclic.origin or 'an edit'} needs a value that is made from itself",
                    why="a value was replaced by something computed after it",
                    fix="compute the new value from the inputs, or replace the output instead",
                )
            current.in_progress = True
            waiting += reversed(missing)
            continue
        waiting.pop()
        if current.op == "read":
            current.node = current.args[0].node if isinstance(current.args[0], Term) else current.args[0]
        if current.node is None:
            if current.target is decide and current.origin:
                current.args = (*current.args[:3], any(_leaves_a_trace(node) for node in graph.nodes))
            args, kwargs = (map_terms(value, lambda operand: operand.node) for value in (current.args, current.kwargs))
            current.node = graph.create_node(current.op, current.target, args, kwargs)
            current.node.meta.update(surgery=current.origin, step=current.step)
            if current.writes:
                current.node.meta["writes"] = True
            elif draws(current.op, current.target, current.args, current.kwargs):
                current.node.meta["draws"] = True
            elif id(current) in effects:
                current.node.meta["needed"] = True
    assert term.node is not None
    return term.node


def _leaves_a_trace(node: fx.Node) -> bool:
    return bool({"writes", "draws"} & node.meta.keys()) or is_foreign(node.op, node.target)
