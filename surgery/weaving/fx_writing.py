"""Writes the terms of a forward as an fx graph: those that the output or an effect needs, each at its place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from surgery.errors import SiteError
from surgery.forward.parameter_view import base_forward
from surgery.forward.repeated_runs import RunCount, check_skipped_forward, repeat_forward, repeat_method, repeat_module
from surgery.forward.side_effects import draws, is_foreign
from surgery.forward.tape_steps import Ref
from surgery.tracing.decisions import decide
from surgery.weaving.term_graph import KEPT, OUTPUT, ROWS, TermGraph
from surgery.weaving.terms import Term, behind, mapped, sources_of, terms_in

__all__ = ["write_graph"]


def write_graph(terms: TermGraph) -> fx.Graph:
    """The graph of the terms' forward. Raises `SiteError` where an edit needs a value before it is made."""
    graph = fx.Graph()
    _write_inputs(terms, graph)
    output = terms.now[Ref("output", "")]
    needed = {id(term): term for term in sources_of((output, terms.effects))}
    _count_runs(terms, list(needed.values()))
    if terms.call is not None and id(terms.call) not in needed and len(terms.own.signature.parameters) > 1:
        itself, _, *given = terms.call.args[:6]
        terms.effects.append(terms.term("call_function", check_skipped_forward, (itself, *given)))
    effects = {id(term): term for term in terms.effects}
    for term in sorted({**needed, **effects}.values(), key=lambda term: term.place):
        if term.op != "get_attr":  # read where it is used
            _write(term, graph, effects)
    _check_order(terms, graph)
    graph.output(mapped(output, lambda term: _write(term, graph, effects)))
    for made in map(behind, terms.outputs):
        if isinstance(made, Term) and made.node is not None:
            made.node.meta["output"] = True
    return graph


def _write_inputs(terms: TermGraph, graph: fx.Graph) -> None:
    inputs = {term.target: term for term in terms.terms if term.op == "placeholder"}
    for name in (ROWS, OUTPUT, KEPT):
        if name in inputs:
            inputs[name].node = graph.placeholder(name)
        elif name == KEPT and terms.own.graph is not None:
            graph.placeholder(name)
    for name, parameter in terms.own.signature.parameters.items():
        starred = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        inputs[name].node = graph.placeholder(starred + name, default_value=parameter.default)


def _count_runs(terms: TermGraph, needed: list[Term]) -> None:
    """Let what edits run more than once see to it that it may: the own forward as it is, a module, an object."""
    same: dict[tuple, list[Term]] = {}
    for term in needed:
        if term.target is base_forward and (term is terms.call or not term.args[1]):
            same.setdefault((base_forward,), []).append(term)
        elif term.op == "call_module" or term.op == "call_method" and not hasattr(Tensor, term.target):
            same.setdefault((term.op, term.target), []).append(term)
    for (kind, *_), runs in same.items():
        origin = next((term.origin for term in runs if term.origin), "")
        if len(runs) < 2 or not origin:  # what the forward itself does twice is the model's
            continue
        counter = terms.term("call_function", RunCount, (len(runs),), origin=origin)
        for term in runs:
            if kind is base_forward:
                term.target, term.args = repeat_forward, (counter, *term.args)
                continue
            path = term.target if kind == "call_module" else "_surgery_self"
            given = (terms.term("get_attr", path), *(() if kind == "call_module" else (term.target,)))
            function = repeat_module if kind == "call_module" else repeat_method
            term.op, term.target = "call_function", function
            term.args, term.kwargs = (counter, *given, tuple(term.args), term.kwargs), {}


def _check_order(terms: TermGraph, graph: fx.Graph) -> None:
    """Refuse rewrites that write in place, if their lines had to be put in another order."""
    at = {node: index for index, node in enumerate(graph.nodes)} if terms.ordered else {}
    for origin, made in terms.ordered:
        lines = [at[term.node] for term in made if term.node is not None]
        if lines != sorted(lines):
            raise SiteError(
                f"the lines of {origin or 'the forward'} can't keep the order in which they are written",
                why="it writes in place, and a value is replaced by what is computed after it is used",
                fix="write x + y in the place of x.add_(y), or replace values in the order of the forward",
            )


def _write(term: Term, graph: fx.Graph, effects: Mapping[int, Term]) -> fx.Node:
    waiting = [term]  # not by recursion: each live adapter adds to what the one before it made
    while waiting:
        now = waiting[-1]
        lacking = [] if now.node is not None else [t for t in terms_in((now.args, now.kwargs)) if t.node is None]
        if lacking:
            if around := next((other for other in lacking if other.open), None):
                raise SiteError(
                    f"{around.origin or 'an edit'} needs a value that is made from itself",
                    why="a value was replaced by something computed after it",
                    fix="compute the new value from the inputs, or replace the output instead",
                )
            now.open = True
            waiting += reversed(lacking)
            continue
        waiting.pop()
        if now.op == "read":
            now.node = now.args[0].node if isinstance(now.args[0], Term) else now.args[0]
        if now.node is None:
            if now.target is decide and now.origin:
                now.args = (*now.args[:3], any(_leaves_a_trace(node) for node in graph.nodes))
            args, kwargs = (mapped(value, lambda made: made.node) for value in (now.args, now.kwargs))
            now.node = graph.create_node(now.op, now.target, args, kwargs)
            now.node.meta.update(surgery=now.origin, step=now.step)
            if now.writes:
                now.node.meta["writes"] = True
            elif draws(now.op, now.target, now.args, now.kwargs):
                now.node.meta["draws"] = True
            elif id(now) in effects:
                now.node.meta["needed"] = True
    assert term.node is not None
    return term.node


def _leaves_a_trace(node: fx.Node) -> bool:
    return bool({"writes", "draws"} & node.meta.keys()) or is_foreign(node.op, node.target)
