"""Plays tapes on the terms of a forward: each step becomes a term, or changes what stands for a value."""

from __future__ import annotations

import operator
from typing import Any

from surgery.complex_numbers import is_number
from surgery.errors import SiteError
from surgery.forward.context_regions import Inside
from surgery.forward.graph_functions import detached, in_dtype, same_dtype, weighted
from surgery.forward.parameter_view import call_child
from surgery.forward.tape import Layer, Tape
from surgery.forward.tape_steps import Ref, Step, thaw
from surgery.forward.unnamed_inputs import FIRST, first_input
from surgery.tracing.decisions import check_decision, decide
from surgery.tracing.guards import in_region
from surgery.weaving.called_around import called_around, handing, takes_module
from surgery.weaving.line_places import LinePlaces
from surgery.weaving.own_calls import repeat_own
from surgery.weaving.term_graph import ROWS, TermGraph
from surgery.weaving.terms import Term, acts, behind, node_of, sources_of, swapped, terms_in

__all__ = ["apply_layer", "play"]


def apply_layer(graph: TermGraph, layer: Layer) -> None:
    origin = f"{layer.label} [{layer.adapter}]"
    before = graph.now[Ref("output", "")]
    graph.replacements.append([])
    made = play(graph, layer.tape, layer.adapter, origin, layer.weight)
    graph.effects += [term for term in made if term.writes or acts(term)]
    after = graph.now[Ref("output", "")]
    if after is not before and isinstance(after, Term) and isinstance(before, Term) and not _alone(after, before):
        # A module's output keeps its dtype, whatever precision an adapter computes in.
        graph.now[Ref("output", "")] = graph.term("call_function", same_dtype, (after, before), origin=origin)
    graph.outputs.append(graph.now[Ref("output", "")])


def play(graph: TermGraph, tape: Tape, adapter: str, origin: str, weight: float = 1.0) -> list[Term]:
    """Run a tape's steps. Inputs and parameters are what stood there before the tape; the output and what is inside
    the forward, what stands there by then; operands of a match follow what the tape puts in their place."""
    seen = dict(graph.now)
    earlier = list(graph.terms)
    made: list[Term] = []
    reads: list[Term] = []
    operands: list[tuple[Ref, Any]] = []  # what a step reads
    moved: set[Ref] = set()  # what the tape has replaced for all that uses it
    places = LinePlaces(tape, graph.places)

    def resolve(ref: Ref) -> Any:
        if ref.kind == "op":
            return ops[ref.key]
        if ref.kind == "param":
            return graph.state(seen, f"adapters.{adapter}.{ref.key}")
        if ref.kind == "state":
            return graph.state(seen, str(ref.key))
        if ref.kind == "training":
            return graph.state(seen, "training")
        if ref.kind == "rows":
            return graph.term("call_function", operator.getitem, (graph.before(ROWS), ref.key))
        if ref.kind == "this":
            return graph.state(seen, "_surgery_self")
        plain = ref._replace(read="")
        found = (graph.now if plain in moved or ref.kind == "output" else seen).get(plain)
        if found is None:
            raise SiteError(f"the forward has no {ref.kind} {ref.key!r}", fix=_known(seen))
        return found

    def read(ref: Ref) -> Any:
        """A value as an operand. What may be replaced later in the tape stands behind a term of its own."""
        found = resolve(ref)
        operands.append((ref, found))
        if not (ref.read or ref.kind == "output" and graph.places) or not isinstance(found, Term):
            return found
        reads.append(graph.term("read", "", (found,), origin=origin, place=places.of(ref, found)))
        return reads[-1]

    ops: dict[str | int, Any] = {}
    for index, step in enumerate(tape.steps):
        if step.training is not None and step.training != graph.training:
            continue
        if step.kind == "replace":
            _replace(graph, step, resolve, read, [*earlier, *reads], weight)
            if graph.replacements:
                graph.replacements[-1] += terms_in(behind(graph.now[step.args[0]]))
            moved |= {ref for ref in step.args[:1] if ref.kind == "inside" and not step.kwargs}
            continue
        operands.clear()
        args, kwargs = thaw(step.args, read), thaw(step.kwargs, read)
        if step.kind == "around":
            _put_around(graph, graph.term("call_function", step.target, args, origin=origin), behind(kwargs["at"]))
            continue
        begin = len(graph.terms)
        args, kwargs = (
            handing(value, lambda function: graph.term("call_function", function)) for value in (args, kwargs)
        )
        if step.kind == "own":
            ops[index] = repeat_own(graph, args, kwargs, origin)
        else:
            op, target, args = node_of(step, args)
            if target is check_decision and graph.own.graph is not None:
                target, args = decide, (*args, False)
            elif step.region is not None:
                op, target = "call_function", Inside(step.region, target)
            ops[index] = graph.term(op, target, args, kwargs, origin)
            made.append(ops[index])
        if isinstance(ops[index], Term):
            ops[index].step = ops[index].step or (len(graph.replacements), index)
        place = places.step(index, operands)
        for term in graph.terms[begin:]:
            term.place = (*place, len(graph.terms))
    if places.writes:
        graph.ordered.append((origin, made))
    return made


def _put_around(graph: TermGraph, made: Term, at: Term | None) -> None:
    if at is not None:
        _wrap(graph, at, made)
    elif graph.own.graph is not None:
        if any("registry" in node.meta for node in graph.own.graph.nodes):
            raise SiteError(
                f"{made.origin} can't put a function around those that the forward takes from registries",
                why="another rule goes through them (site.find with leaves=False): there is no call to be around",
                fix="apply one of the two rules, or put both edits into one rule",
            )
        for term in [term for term in graph.terms if takes_module(term)]:
            _wrap(graph, term, made)
    elif graph.call is not None:
        inner, around = graph.call.args[:6], graph.call.args[6:] or ((),)
        graph.call.args = (*inner, (*around[0], made))
    else:
        raise SiteError("a forward that is held as operations takes no functions from a registry")


def _wrap(graph: TermGraph, term: Term, made: Term) -> None:
    """Put what `made` gives around the function that a term calls."""
    if not term.around:
        name = f"_around_{len(graph.kept)}"
        graph.kept[name] = term.target
        function = graph.kept_function(name)
        term.target, term.args, term.around = called_around, (function, (), *term.args), True
    term.args = (term.args[0], (*term.args[1], made), *term.args[2:])


def _replace(graph: TermGraph, step: Step, resolve: Any, read: Any, users: list[Term], weight: float) -> None:
    ref, frozen = step.args
    new = thaw(frozen, read)
    if weight != 1.0:
        new = _weighted(graph, resolve(ref), new, weight)
    output = Ref("output", "")
    old = behind(graph.now.get(output) if ref == output else resolve(ref))
    if isinstance(old, Term) and behind(new) is not old:
        graph.effects = [term for term in graph.effects if term is not old]  # it wrote what is replaced
    if ref == output:
        graph.now[ref] = new
        return
    if ref.kind == "inside":
        new = _in_dtype_of(graph, str(ref.key), new, old)
    only = [behind(resolve(user)) for user in step.kwargs]
    inside = {id(term) for term in sources_of(new)}
    for term in only or users:
        if term.op != "read" or id(term) not in inside:  # its own operands stay what they are
            term.args, term.kwargs = swapped(term.args, old, new), swapped(term.kwargs, old, new)
    if ref.kind == "state" and graph.call is not None:
        itself, tensors, *rest = graph.call.args
        graph.call.args = (itself, {**tensors, str(ref.key): new}, *rest)
    elif ref.kind == "state":
        _give_to_child(graph, str(ref.key), new)
    if not only:
        graph.now[output] = swapped(graph.now[output], old, new)
    graph.now[ref] = new
    if ref == Ref("input", FIRST):
        for name, given in graph.with_first(new, new.origin if isinstance(new, Term) else "").items():
            before = graph.now[Ref("input", name)]
            for term in (term for term in users if term.target is not first_input):
                term.args, term.kwargs = swapped(term.args, before, given), swapped(term.kwargs, before, given)
            graph.now[Ref("input", name)] = given


def _give_to_child(graph: TermGraph, path: str, new: Any) -> None:
    """A parameter of a child is used by its calls, which then are of a view of it that has the new one."""
    for term in [term for term in graph.terms if term.op == "call_module" or term.target is call_child]:
        child = term.target if term.op == "call_module" else term.args[0].target
        if not path.startswith(f"{child}."):
            continue
        if term.op == "call_module":
            term.args = (graph.term("get_attr", child), {}, *term.args)
            term.op, term.target = "call_function", call_child
        term.args = (term.args[0], {**term.args[1], path.removeprefix(f"{child}."): new}, *term.args[2:])


def _weighted(graph: TermGraph, old: Any, new: Any, weight: float) -> Any:
    """`new` with what it changes of `old` multiplied; a sum stays a sum, so that fast forms are found in it."""
    old = behind(old)
    if isinstance(new, Term) and new.target is operator.add and sum(behind(item) is old for item in new.args) == 1:
        added = behind(next(item for item in new.args if behind(item) is not old))
        scale: Any = weight
        if isinstance(added, Term) and added.target is operator.mul and type(added.args[1]) in (int, float):
            added, scale = added.args[0], added.args[1] * weight
        change = graph.term("call_function", operator.mul, (added, scale), origin=new.origin)
        return graph.term("call_function", operator.add, (old, change), origin=new.origin)
    origin = new.origin if isinstance(new, Term) else ""
    return graph.term("call_function", weighted, (old, new, weight), origin=origin)


def _in_dtype_of(graph: TermGraph, name: str, new: Any, old: Term) -> Any:
    """A value inside a forward keeps its dtype, whatever precision an adapter computes in: code may go by it."""
    node = next(node for node in graph.own.graph.nodes if node.name == name) if graph.own.graph is not None else None
    if node is not None and node.target is in_region and node.args[0][2] is False and isinstance(new, Term):
        new = graph.term("call_function", detached, (new,), origin=new.origin or old.origin)  # under torch.no_grad
    dtype = node.meta.get("dtype") if node is not None else None
    if dtype is None or not is_number(dtype) or not isinstance(new, Term):
        return new
    return graph.term("call_function", in_dtype, (new, dtype), origin=new.origin or old.origin)


def _alone(after: Term, before: Term) -> bool:
    """Whether an output that is cast already needs nothing of the one before, which then is not computed."""
    casts = (after.op, after.target) == ("call_method", "to") or after.target is in_dtype
    if not casts and not getattr(after.target, "keeps_dtype", False):
        return False
    return all(term is not behind(before) for term in sources_of(after))


def _known(seen: dict[Ref, Any]) -> str:
    names = [str(ref.key) for ref in seen if ref.kind == "input"]
    return f"its inputs are {', '.join(names)}" if names else "it takes no named inputs"
