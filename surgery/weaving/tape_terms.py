"""Plays tapes on the terms of a forward: each step becomes a term, or replaces the term of a value."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from surgery.complex_numbers import is_number
from surgery.errors import SiteError
from surgery.forward.context_regions import Inside
from surgery.forward.graph_functions import detached, in_dtype, same_dtype, weighted
from surgery.forward.parameter_view import call_child
from surgery.forward.tape import Layer, Tape
from surgery.forward.tape_steps import Ref, Step, thaw
from surgery.forward.unnamed_inputs import FIRST, first_input
from surgery.packed.dequantised_stack import dequantised_stack, lazy_stack
from surgery.packed.packed_weight import dequantised_weight
from surgery.tracing.decisions import check_decision, decide
from surgery.tracing.guards import in_region
from surgery.weaving.line_places import START, LinePlaces
from surgery.weaving.own_calls import repeat_own
from surgery.weaving.term_graph import ROWS, TermGraph
from surgery.weaving.terms import Term, must_run, node_parts, skip_reads, sources_of, substitute, terms_in
from surgery.weaving.wrapped_calls import call_wrapped, function_terms, takes_module

__all__ = ["apply_layer", "play"]


def apply_layer(graph: TermGraph, layer: Layer) -> None:
    """Apply a rule's edits to the terms of a forward."""
    origin = f"{layer.label} [{layer.adapter}]"
    before = graph.current[Ref("output", "")]
    graph.replacements.append([])
    played = play(graph, layer.tape, layer.adapter, origin, layer.weight)
    graph.effects += [term for term in played if term.writes or must_run(term)]
    after = graph.current[Ref("output", "")]
    if (
        after is not before
        and isinstance(after, Term)
        and isinstance(before, Term)
        and not _replaces_whole_output(after, before)
    ):
        # A module's output keeps its dtype, whatever the precision of the adapter's computation.
        graph.current[Ref("output", "")] = graph.add_term("call_function", same_dtype, (after, before), origin=origin)
    graph.outputs.append(graph.current[Ref("output", "")])


def play(graph: TermGraph, tape: Tape, adapter: str, origin: str, weight: float = 1.0) -> list[Term]:
    """Play a tape's steps. Returns the terms of the steps.

    Inputs, parameters and values inside the forward have their value before the tape. The output, and operands of a
    match that the tape replaced, have their present value.
    """
    seen = dict(graph.current)
    earlier = list(graph.terms)
    played: list[Term] = []
    reads: list[Term] = []
    operands: list[tuple[Ref, Any]] = []  # the values that a step reads
    replaced: set[Ref] = set()  # the values that the tape has replaced for all their users
    places = LinePlaces(tape, graph.places)

    def resolve(ref: Ref) -> Any:
        if ref.kind == "op":
            return ops[ref.key]
        if ref.kind == "param":
            return graph.read_state(seen, f"adapters.{adapter}.{ref.key}")
        if ref.kind == "state":
            return graph.read_state(seen, str(ref.key))
        if ref.kind == "training":
            return graph.read_state(seen, "training")
        if ref.kind == "rows":
            return graph.add_term("call_function", operator.getitem, (graph.leading_input(ROWS), ref.key))
        if ref.kind == "this":
            return graph.read_state(seen, "_surgery_self")
        unread = ref._replace(read="")
        value = (graph.current if unread in replaced or ref.kind == "output" else seen).get(unread)
        if value is None:
            raise SiteError(f"the forward has no {ref.kind} {ref.key!r}", fix=_describe_inputs(seen))
        return value

    def read(ref: Ref) -> Any:
        """Returns a value as an operand. A value that the tape may replace later gets a "read" term."""
        value = resolve(ref)
        operands.append((ref, value))
        if not (ref.read or ref.kind == "output" and graph.places) or not isinstance(value, Term):
            return value
        reads.append(graph.add_term("read", "", (value,), origin=origin, place=places.place_of(ref, value)))
        return reads[-1]

    ops: dict[str | int, Any] = {}
    for index, step in enumerate(tape.steps):
        if step.training is not None and step.training != graph.training:
            continue
        if step.kind == "replace":
            _replace(graph, step, resolve, read, [*earlier, *reads], weight)
            if graph.replacements:
                graph.replacements[-1] += terms_in(skip_reads(graph.current[step.args[0]]))
            replaced |= {ref for ref in step.args[:1] if ref.kind == "inside" and not step.kwargs}
            continue
        operands.clear()
        args, kwargs = thaw(step.args, read), thaw(step.kwargs, read)
        if step.kind == "around":
            _put_around(
                graph, graph.add_term("call_function", step.target, args, origin=origin), skip_reads(kwargs["at"])
            )
            continue
        begin = len(graph.terms)
        args, kwargs = (
            function_terms(value, lambda function: graph.add_term("call_function", function))
            for value in (args, kwargs)
        )
        if step.kind == "own":
            ops[index] = repeat_own(graph, args, kwargs, origin)
        else:
            op, target, args = node_parts(step, args)
            if getattr(target, "reads_codes", False):
                args = tuple([_codes_of(graph, value) for value in args])
            if target is check_decision and graph.own.graph is not None:
                target, args = decide, (*args, False)
            elif step.region is not None:
                op, target = "call_function", Inside(step.region, target)
            ops[index] = graph.add_term(op, target, args, kwargs, origin)
            played.append(ops[index])
        if isinstance(ops[index], Term):
            ops[index].step = ops[index].step or (len(graph.replacements), index)
        place = places.place_step(index, operands)
        for term in graph.terms[begin:]:
            term.place = (*place, len(graph.terms))
    if places.writes:
        graph.ordered.append((origin, played))
    return played


def _codes_of(graph: TermGraph, value: Any) -> Any:
    """The module in the place of its dequantised weight, for functions that may not need the weight in each call.

    In the place of a dequantised stack, a stand-in that dequantises the experts which the function picks.
    """
    if isinstance(value, Term) and value.target is dequantised_stack:
        return graph.add_term("call_function", lazy_stack, value.args, place=START)
    reads = isinstance(value, Term) and value.target is dequantised_weight
    return value.args[0] if reads else value


def _put_around(graph: TermGraph, outer: Term, wrapped: Term | None) -> None:
    """Wrap one call, or without `wrapped` all calls of functions from registries."""
    if wrapped is not None:
        _wrap_function(graph, wrapped, outer)
    elif graph.own.graph is not None:
        if any("registry" in node.meta for node in graph.own.graph.nodes):
            raise SiteError(
                f"{outer.origin} can't put a function around those that the forward takes from registries",
                why="another rule goes through them (site.find with leaves=False): there is no call to be around",
                fix="apply one of the two rules, or put both edits into one rule",
            )
        for term in [term for term in graph.terms if takes_module(term)]:
            _wrap_function(graph, term, outer)
    elif graph.call is not None:
        inner, wrappers = graph.call.args[:6], graph.call.args[6:] or ((),)
        graph.call.args = (*inner, (*wrappers[0], outer))
    else:
        raise SiteError("a forward that is held as operations takes no functions from a registry")


def _wrap_function(graph: TermGraph, term: Term, outer: Term) -> None:
    """Wrap the function that a term calls into the function that `outer` returns."""
    if not term.is_wrapped:
        name = f"_around_{len(graph.constants)}"
        graph.constants[name] = term.target
        function = graph.add_constant(name)
        term.target, term.args, term.is_wrapped = call_wrapped, (function, (), *term.args), True
    term.args = (term.args[0], (*term.args[1], outer), *term.args[2:])


def _replace(
    graph: TermGraph,
    step: Step,
    resolve: Callable[[Ref], Any],
    read: Callable[[Ref], Any],
    users: list[Term],
    weight: float,
) -> None:
    """Replace a value: the terms that use it (or only some of them) use the new value from now on."""
    ref, frozen = step.args
    new = thaw(frozen, read)
    if weight != 1.0:
        new = _weighted(graph, resolve(ref), new, weight)
    output = Ref("output", "")
    old = skip_reads(graph.current.get(output) if ref == output else resolve(ref))
    if isinstance(old, Term) and skip_reads(new) is not old:
        graph.effects = [term for term in graph.effects if term is not old]  # its write is replaced
    if ref == output:
        graph.current[ref] = new
        return
    if ref.kind == "inside":
        new = _in_dtype_of(graph, str(ref.key), new, old)
    only = [skip_reads(resolve(user)) for user in step.kwargs]
    sources = {id(term) for term in sources_of(new)}
    for term in only or users:
        if term.op != "read" or id(term) not in sources:  # the operands of the new value stay
            term.args, term.kwargs = substitute(term.args, old, new), substitute(term.kwargs, old, new)
    if ref.kind == "state" and graph.call is not None:
        itself, tensors, *rest = graph.call.args
        graph.call.args = (itself, {**tensors, str(ref.key): new}, *rest)
    elif ref.kind == "state":
        _give_to_child(graph, str(ref.key), new)
    if not only:
        graph.current[output] = substitute(graph.current[output], old, new)
    graph.current[ref] = new
    if ref == Ref("input", FIRST):
        for name, starred in graph.with_first(new, new.origin if isinstance(new, Term) else "").items():
            before = graph.current[Ref("input", name)]
            for term in (term for term in users if term.target is not first_input):
                term.args, term.kwargs = (
                    substitute(term.args, before, starred),
                    substitute(term.kwargs, before, starred),
                )
            graph.current[Ref("input", name)] = starred


def _give_to_child(graph: TermGraph, path: str, new: Any) -> None:
    """Replace a child's parameter: each call of the child becomes a call of a view with the new parameter."""
    for term in [term for term in graph.terms if term.op == "call_module" or term.target is call_child]:
        child = term.target if term.op == "call_module" else term.args[0].target
        if not path.startswith(f"{child}."):
            continue
        if term.op == "call_module":
            term.args = (graph.add_term("get_attr", child), {}, *term.args)
            term.op, term.target = "call_function", call_child
        term.args = (term.args[0], {**term.args[1], path.removeprefix(f"{child}."): new}, *term.args[2:])


def _weighted(graph: TermGraph, old: Any, new: Any, weight: float) -> Any:
    """Multiply the change from `old` to `new` by a weight. A sum stays a sum, so that `lower` recognises it."""
    old = skip_reads(old)
    if isinstance(new, Term) and new.target is operator.add and sum(skip_reads(item) is old for item in new.args) == 1:
        added = skip_reads(next(item for item in new.args if skip_reads(item) is not old))
        scale: Any = weight
        if isinstance(added, Term) and added.target is operator.mul and type(added.args[1]) in (int, float):
            added, scale = added.args[0], added.args[1] * weight
        change = graph.add_term("call_function", operator.mul, (added, scale), origin=new.origin)
        return graph.add_term("call_function", operator.add, (old, change), origin=new.origin)
    origin = new.origin if isinstance(new, Term) else ""
    return graph.add_term("call_function", weighted, (old, new, weight), origin=origin)


def _in_dtype_of(graph: TermGraph, name: str, new: Any, old: Term) -> Any:
    """Cast a replacement inside the forward to the dtype of the replaced value, because later code may depend on it."""
    node = next(node for node in graph.own.graph.nodes if node.name == name) if graph.own.graph is not None else None
    if node is not None and node.target is in_region and node.args[0][2] is False and isinstance(new, Term):
        new = graph.add_term("call_function", detached, (new,), origin=new.origin or old.origin)  # under torch.no_grad
    dtype = node.meta.get("dtype") if node is not None else None
    if dtype is None or not is_number(dtype) or not isinstance(new, Term):
        return new
    return graph.add_term("call_function", in_dtype, (new, dtype), origin=new.origin or old.origin)


def _replaces_whole_output(after: Term, before: Term) -> bool:
    """Whether a new output has its own cast and does not use the output before, which is then not computed."""
    casts = (after.op, after.target) == ("call_method", "to") or after.target is in_dtype
    if not casts and not getattr(after.target, "keeps_dtype", False):
        return False
    return all(term is not skip_reads(before) for term in sources_of(after))


def _describe_inputs(seen: dict[Ref, Any]) -> str:
    names = [str(ref.key) for ref in seen if ref.kind == "input"]
    return f"its inputs are {', '.join(names)}" if names else "it takes no named inputs"
