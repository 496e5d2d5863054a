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

import operator
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from surgery.arithmetic.complex_numbers import is_number
from surgery.errors import SiteError, SurgeryWarning
from surgery.forward.context_regions import Inside
from surgery.forward.graph_functions import detached, in_dtype, same_dtype, weighted
from surgery.forward.own_forward import Own, recorded_own
from surgery.forward.parameter_view import base_forward, call_child
from surgery.forward.repeated_runs import Runs, left_out, repeated, repeated_method, repeated_module
from surgery.forward.side_effects import draws, is_foreign
from surgery.forward.tape import Layer, Ref, Step, Tape, thawed
from surgery.forward.unnamed_inputs import FIRST, first_given, first_names, hidden_first, starred_of, with_first
from surgery.tracing.decisions import check_decision, decide
from surgery.tracing.fx_args import plain
from surgery.tracing.guards import in_region
from surgery.weaving.called_around import called_around, handing, takes_module
from surgery.weaving.line_places import END, START, LinePlaces, Place
from surgery.weaving.lowering import lower
from surgery.weaving.terms import Term, acts, behind, mapped, node_of, sources_of, swapped, terms_in, value_operands

__all__ = ["trace_site", "woven", "woven_edit", "woven_held"]


def woven(own: Own, layers: Sequence[Layer], training: bool, lowered: bool = True) -> fx.Graph:
    """The graph of the site's forward with the layers' edits, in training or evaluation mode.

    `lowered=False` keeps the rules' own form, without the fast forms of `surgery.weaving.lowering`. Raises `SiteError`
    where an edit would need a value before it is made.
    """
    weaver = _Weaver(own)
    weaver.base(training)
    for layer in layers:
        weaver.edit(layer)
    graph = weaver.written()
    weaver.warn_hidden(layers)
    if lowered:
        lower(graph)
    return graph


def woven_held(own: Own, layers: Sequence[Layer]) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph of a forward that is held as operations, with the layers' edits inside it; and the functions it keeps.

    Its first input, before the forward's own, is the mapping of what the graph keeps.
    """
    weaver = _Weaver(own)
    weaver.base(False)
    for layer in layers:
        weaver.edit(layer)
    graph = weaver.written()
    weaver.warn_hidden(layers)
    return graph, weaver.kept


def woven_edit(own: Own, layers: Sequence[Layer], training: bool) -> fx.Graph:
    """What the layers make of a site's output, as a graph of its own; its first input, before the forward's, is that
    output."""
    weaver = _Weaver(own)
    weaver.beside(training)
    for layer in layers:
        weaver.edit(layer)
    return weaver.written()


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
    own = recorded_own(module)
    return fx.GraphModule(module, woven(own, [], module.training), own.base.__name__)


class _Weaver:
    def __init__(self, own: Own):
        self.own = own
        self.training = False
        self.now: dict[Ref, Any] = {}  # what stands for a value at present: a term, or a structure of terms
        self.terms: list[Term] = []
        self.effects: list[Term] = []  # terms that run for what they do, whether or not their result is used
        self.needed: set[int] = set()  # ids of these, once the graph is written
        self.replacements: list[list[Term]] = []  # for each layer: the terms that it puts in the place of others
        self.ordered: list[tuple[str, list[Term]]] = []  # lines of rewrites that write in place, in their order
        self.places: dict[str, int] = {}  # which operation of the forward a node is
        self.call: Term | None = None  # an opaque site's call of its base
        self.kept: dict[str, Any] = {}  # functions that rules put others around

    def base(self, training: bool) -> None:
        self._inputs(training)
        if self.own.held is not None:
            self._acting(self._operations(self.own.held))
        elif self.own.tapes is None:
            self.call = self._opaque({}, {})
            self.now[Ref("output", "")] = self.call
        else:
            self._acting(self._base_steps(self.own.tapes[training]))
        self.now[Ref("base", "")] = self.now[Ref("output", "")]

    def _base_steps(self, tape: Tape) -> list[Term]:
        made = self._play(tape, "", "")
        for index, term in enumerate(made):
            term.place = (index, 0, 0)
        return made

    def beside(self, training: bool) -> None:
        self._inputs(training)
        self.now[Ref("output", "")] = self.now[Ref("base", "")] = self._before(OUTPUT)

    def _inputs(self, training: bool) -> None:
        self.training = training
        for name in self.own.signature.parameters:
            self.now[Ref("input", name)] = self._term("placeholder", name)
        if hidden_first(self.own.signature):
            given = (first_names(self.own.base), *self._starred())
            self.now[Ref("input", FIRST)] = self._term("call_function", first_given, given)

    def _starred(self) -> tuple[Any, Any]:
        """What the forward's `*args` and `**kwargs` are at present."""
        names = starred_of(self.own.signature)
        return (
            self.now[Ref("input", names["*"])] if "*" in names else (),
            self.now[Ref("input", names["**"])] if "**" in names else {},
        )

    def _with_first(self, new: Any, origin: str) -> dict[str, Term]:
        """The forward's `*args` and `**kwargs` with another first input, by their names."""
        values = (first_names(self.own.base), new, *self._starred())
        given = self._term("call_function", with_first, values, origin=origin)
        at = {"*": 0, "**": 1}
        return {
            name: self._term("call_function", operator.getitem, (given, at[star]), origin=origin)
            for star, name in starred_of(self.own.signature).items()
        }

    def _operations(self, graph: fx.Graph) -> list[Term]:
        """The operations of a traced graph. A rule knows each as ("inside", the name of its node)."""
        terms: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            args, kwargs = plain(node.args, terms.__getitem__), plain(node.kwargs, terms.__getitem__)
            if node.op == "output":
                self.now[Ref("output", "")] = args[0]
                continue
            if node.op == "placeholder":
                terms[node] = self.now[Ref("input", str(node.target).lstrip("*"))]
            elif node.op == "get_attr" and str(node.target).startswith("_kept_"):
                terms[node] = self._kept(str(node.target))
            elif node.op == "get_attr":
                terms[node] = self._state(self.now, str(node.target))
            else:
                terms[node] = self._term(node.op, node.target, args, kwargs)
                self.places[node.name] = len(self.places)
                terms[node].place = (self.places[node.name], 0, 0)
                self.now[Ref("made", node.name)] = terms[node]
            self.now[Ref("inside", node.name)] = terms[node]
        return [term for node, term in terms.items() if node.op.startswith("call_")]

    def _kept(self, name: str) -> Term:
        return self._term("call_function", operator.getitem, (self._before(KEPT), name))

    def _before(self, name: str) -> Term:
        """An input that comes before the forward's own."""
        ref = Ref("input", name)
        if ref not in self.now:
            self.now[ref] = self._term("placeholder", name)
        return self.now[ref]

    def _acting(self, made: list[Term]) -> None:
        """Note what runs for what it does: what writes in place, and what nobody uses."""
        unused = {id(term) for term in self._unused(made)}
        self.effects += [term for term in made if id(term) in unused or term.writes]

    def _unused(self, made: list[Term]) -> list[Term]:
        used = {id(inner) for term in self.terms for inner in terms_in((term.args, term.kwargs))}
        used |= {id(term) for term in terms_in(self.now[Ref("output", "")])}
        return [term for term in made if id(term) not in used]

    def _opaque(self, inputs: dict[str, Any], tensors: dict[str, Any], origin: str = "") -> Term:
        positional, more, named, extra = [], (), {}, {}
        if FIRST in inputs:
            inputs = {**inputs, **self._with_first(inputs[FIRST], origin)}
        starred = any(p.kind is p.VAR_POSITIONAL for p in self.own.signature.parameters.values())
        for name, parameter in self.own.signature.parameters.items():
            value = inputs.get(name, self.now[Ref("input", name)])
            if parameter.kind is parameter.VAR_POSITIONAL:
                more = value
            elif parameter.kind is parameter.VAR_KEYWORD:
                extra = value
            elif parameter.kind is parameter.KEYWORD_ONLY:
                named[name] = value
            elif (
                parameter.default is not parameter.empty
                and not starred
                and self.own.names_hold
                and parameter.kind is not parameter.POSITIONAL_ONLY
            ):
                named[name] = value  # decorators of forwards (transformers' own) look for options among the keywords
            else:
                positional.append(value)
        itself = self._term("get_attr", "_surgery_self")
        return self._term(
            "call_function", base_forward, (itself, tensors, tuple(positional), more, named, extra), origin=origin
        )

    def _again(self, inputs: dict[str, Any], tensors: dict[str, Any], origin: str) -> Any:
        """The site's own operation once more, with other inputs or tensors."""
        if self.own.tapes is None:
            return self._opaque(inputs, tensors, origin)
        ops: dict[str | int, Any] = {}
        output = None

        def resolve(ref: Ref) -> Any:
            if ref.kind == "op":
                return ops[ref.key]
            given = inputs if ref.kind == "input" else tensors
            if ref.key in given:
                return given[str(ref.key)]
            return self._state(self.now, str(ref.key)) if ref.kind == "state" else self.now[ref]

        for index, step in enumerate(self.own.tapes[self.training].steps):
            if step.kind == "replace":
                output = thawed(step.args[1], resolve)
            else:
                node = node_of(step, thawed(step.args, resolve))
                ops[index] = self._term(*node, thawed(step.kwargs, resolve), origin)
        return output

    def edit(self, layer: Layer) -> None:
        origin = f"{layer.label} [{layer.adapter}]"
        before = self.now[Ref("output", "")]
        self.replacements.append([])
        made = self._play(layer.tape, layer.adapter, origin, layer.weight)
        self.effects += [term for term in made if term.writes or acts(term)]
        after = self.now[Ref("output", "")]
        if after is not before and isinstance(after, Term) and isinstance(before, Term) and not _alone(after, before):
            # A module's output keeps its dtype, whatever precision an adapter computes in.
            self.now[Ref("output", "")] = self._term("call_function", same_dtype, (after, before), origin=origin)

    def _play(self, tape: Tape, adapter: str, origin: str, weight: float = 1.0) -> list[Term]:
        """Run a tape's steps. Inputs and parameters are what stood there before the tape; the output and what is inside
        the forward, what stands there by then; operands of a match follow what the tape puts in their place."""
        seen = dict(self.now)
        earlier = list(self.terms)
        made: list[Term] = []
        reads: list[Term] = []
        moved: set[Ref] = set()  # what the tape has replaced for all that uses it
        places = LinePlaces(tape, self.places)

        def resolve(ref: Ref) -> Any:
            if ref.kind == "op":
                return ops[ref.key]
            if ref.kind == "param":
                return self._state(seen, f"adapters.{adapter}.{ref.key}")
            if ref.kind == "state":
                return self._state(seen, str(ref.key))
            if ref.kind == "training":
                return self._state(seen, "training")
            if ref.kind == "rows":
                return self._term("call_function", operator.getitem, (self._before(ROWS), ref.key))
            if ref.kind == "this":
                return self._state(seen, "_surgery_self")
            plain = ref._replace(read="")
            found = (self.now if plain in moved or ref.kind == "output" else seen).get(plain)
            if found is None:
                raise SiteError(f"the forward has no {ref.kind} {ref.key!r}", fix=_known(seen))
            return found

        def read(ref: Ref) -> Any:
            """A value as an operand. What may be replaced later in the tape stands behind a term of its own."""
            found = resolve(ref)
            if not (ref.read or ref.kind == "output" and self.places) or not isinstance(found, Term):
                return found
            reads.append(self._term("read", "", (found,), origin=origin, place=places.of(ref, found)))
            return reads[-1]

        ops: dict[str | int, Any] = {}
        for index, step in enumerate(tape.steps):
            if step.training is not None and step.training != self.training:
                continue
            if step.kind == "replace":
                self._replace(step, resolve, read, [*earlier, *reads], weight)
                if self.replacements:
                    self.replacements[-1] += terms_in(behind(self.now[step.args[0]]))
                moved |= {ref for ref in step.args[:1] if ref.kind == "inside" and not step.kwargs}
                continue
            args, kwargs = thawed(step.args, read), thawed(step.kwargs, read)
            if step.kind == "around":
                self._around(self._term("call_function", step.target, args, origin=origin), behind(kwargs["at"]))
                continue
            begin = len(self.terms)
            args, kwargs = (
                handing(value, lambda function: self._term("call_function", function)) for value in (args, kwargs)
            )
            if step.kind == "own":
                ops[index] = self._again(args, kwargs, origin)
            else:
                op, target, args = node_of(step, args)
                if target is check_decision and self.own.held is not None:
                    target, args = decide, (*args, False)
                elif step.region is not None:
                    op, target = "call_function", Inside(step.region, target)
                ops[index] = self._term(op, target, args, kwargs, origin)
                made.append(ops[index])
            place = places.step(index, (resolve(ref) for ref in places.sources(step)))
            for term in self.terms[begin:]:
                term.place = (*place, len(self.terms))
        if places.writes:
            self.ordered.append((origin, made))
        return made

    def _around(self, made: Term, at: Term | None) -> None:
        if at is not None:
            self._wrap(at, made)
        elif self.own.held is not None:
            if any("registry" in node.meta for node in self.own.held.nodes):
                raise SiteError(
                    f"{made.origin} can't put a function around those that the forward takes from registries",
                    why="another rule goes through them (site.find with leaves=False): there is no call to be around",
                    fix="apply one of the two rules, or put both edits into one rule",
                )
            for term in [term for term in self.terms if takes_module(term)]:
                self._wrap(term, made)
        elif self.call is not None:
            inner, around = self.call.args[:6], self.call.args[6:] or ((),)
            self.call.args = (*inner, (*around[0], made))
        else:
            raise SiteError("a forward that is held as operations takes no functions from a registry")

    def _wrap(self, term: Term, made: Term) -> None:
        """Put what `made` gives around the function that a term calls."""
        if not term.around:
            name = f"_around_{len(self.kept)}"
            self.kept[name] = term.target
            function = self._kept(name)
            term.target, term.args, term.around = called_around, (function, (), *term.args), True
        term.args = (term.args[0], (*term.args[1], made), *term.args[2:])

    def _replace(self, step: Step, resolve: Any, read: Any, users: list[Term], weight: float) -> None:
        ref, frozen = step.args
        new = thawed(frozen, read)
        if weight != 1.0:
            new = self._weighted(resolve(ref), new, weight)
        output = Ref("output", "")
        old = behind(self.now.get(output) if ref == output else resolve(ref))
        if isinstance(old, Term) and behind(new) is not old:
            self.effects = [term for term in self.effects if term is not old]  # it wrote what is replaced
        if ref == output:
            self.now[ref] = new
            return
        if ref.kind == "inside":
            new = self._in_dtype_of(str(ref.key), new, old)
        only = [behind(resolve(user)) for user in step.kwargs]
        inside = {id(term) for term in sources_of(new)}
        for term in only or users:
            if term.op != "read" or id(term) not in inside:  # its own operands stay what they are
                term.args, term.kwargs = swapped(term.args, old, new), swapped(term.kwargs, old, new)
        if ref.kind == "state" and self.call is not None:
            itself, tensors, *rest = self.call.args
            self.call.args = (itself, {**tensors, str(ref.key): new}, *rest)
        elif ref.kind == "state":
            self._give_to_child(str(ref.key), new)
        if not only:
            self.now[output] = swapped(self.now[output], old, new)
        self.now[ref] = new
        if ref == Ref("input", FIRST):
            for name, given in self._with_first(new, new.origin if isinstance(new, Term) else "").items():
                before = self.now[Ref("input", name)]
                for term in (term for term in users if term.target is not first_given):
                    term.args, term.kwargs = swapped(term.args, before, given), swapped(term.kwargs, before, given)
                self.now[Ref("input", name)] = given

    def _give_to_child(self, path: str, new: Any) -> None:
        """A parameter of a child is used by its calls, which then are of a view of it that has the new one."""
        for term in [term for term in self.terms if term.op == "call_module" or term.target is call_child]:
            child = term.target if term.op == "call_module" else term.args[0].target
            if not path.startswith(f"{child}."):
                continue
            if term.op == "call_module":
                term.args = (self._term("get_attr", child), {}, *term.args)
                term.op, term.target = "call_function", call_child
            term.args = (term.args[0], {**term.args[1], path.removeprefix(f"{child}."): new}, *term.args[2:])

    def _weighted(self, old: Any, new: Any, weight: float) -> Any:
        """`new` with what it changes of `old` multiplied; a sum stays a sum, so that fast forms are found in it."""
        old = behind(old)
        if isinstance(new, Term) and new.target is operator.add and sum(behind(item) is old for item in new.args) == 1:
            added = behind(next(item for item in new.args if behind(item) is not old))
            scale: Any = weight
            if isinstance(added, Term) and added.target is operator.mul and type(added.args[1]) in (int, float):
                added, scale = added.args[0], added.args[1] * weight
            change = self._term("call_function", operator.mul, (added, scale), origin=new.origin)
            return self._term("call_function", operator.add, (old, change), origin=new.origin)
        origin = new.origin if isinstance(new, Term) else ""
        return self._term("call_function", weighted, (old, new, weight), origin=origin)

    def _in_dtype_of(self, name: str, new: Any, old: Term) -> Any:
        """A value inside a forward keeps its dtype, whatever precision an adapter computes in: code may go by it."""
        node = next(node for node in self.own.held.nodes if node.name == name) if self.own.held is not None else None
        if node is not None and node.target is in_region and node.args[0][2] is False and isinstance(new, Term):
            new = self._term("call_function", detached, (new,), origin=new.origin or old.origin)  # under torch.no_grad
        dtype = node.meta.get("dtype") if node is not None else None
        if dtype is None or not is_number(dtype) or not isinstance(new, Term):
            return new
        return self._term("call_function", in_dtype, (new, dtype), origin=new.origin or old.origin)

    def _state(self, seen: dict[Ref, Any], path: str) -> Any:
        ref = Ref("state", path)
        if ref not in seen:
            found = self._term("get_attr", path)
            seen[ref] = found
            self.now.setdefault(ref, found)
        return seen[ref]

    def _term(
        self, op: str, target: Any, args: Any = (), kwargs: Any = None, origin: str = "", place: Place | None = None
    ) -> Term:
        term = Term(op, target, args, {} if kwargs is None else kwargs, origin)
        there = op in ("placeholder", "get_attr") or target is first_given
        term.place = (*(place or (START if there else END)), len(self.terms))
        self.terms.append(term)
        return term

    # Writing ------------------------------------------------------------------------------------------------

    def written(self) -> fx.Graph:
        graph = fx.Graph()
        inputs = {term.target: term for term in self.terms if term.op == "placeholder"}
        for name in (ROWS, OUTPUT, KEPT):
            if name in inputs:
                inputs[name].node = graph.placeholder(name)
            elif name == KEPT and self.own.held is not None:
                graph.placeholder(name)
        for name, parameter in self.own.signature.parameters.items():
            starred = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
            inputs[name].node = graph.placeholder(starred + name, default_value=parameter.default)
        output = self.now[Ref("output", "")]
        needed: dict[int, Term] = {}
        waiting = [*terms_in(output), *self.effects]
        while waiting:
            term = waiting.pop()
            if id(term) not in needed:
                needed[id(term)] = term
                waiting += terms_in((term.args, term.kwargs))
        self._counted(needed)
        if self.call is not None and id(self.call) not in needed and len(self.own.signature.parameters) > 1:
            itself, _, *given = self.call.args[:6]
            self.effects.append(self._term("call_function", left_out, (itself, *given)))
        self.needed = {id(term) for term in self.effects}
        for term in self.effects:
            needed[id(term)] = term
        for term in sorted(needed.values(), key=lambda term: term.place):
            if term.op != "get_attr":  # read where it is used
                self._write(term, graph)
        self._check_order(graph)
        graph.output(self._nodes(output, graph))
        return graph

    def warn_hidden(self, layers: Sequence[Layer]) -> None:
        """Warn of each edit that has no effect on the result because of a layer after it."""
        reached = self._reached() if len(layers) > 1 else set()
        for index, layer in enumerate(layers[:-1]):
            if all(id(term) in reached for term in self.replacements[index]):
                continue
            count = self._hidden_by(layers, index)
            if count is not None:
                other = layers[count]
                text = (
                    f"{layer.label} [{layer.adapter}] and {other.label} [{other.adapter}] are live on one "
                    f"{self.own.base.__name__}, and an edit of the first has no effect: the second puts a value in the "
                    "place of an operation that uses it; make one of them live at a time, or apply them in the other "
                    "order"
                )
                warnings.warn(text, SurgeryWarning, stacklevel=3)

    def _reached(self) -> set[int]:
        """Ids of all terms whose values the output or an effect depends on."""
        reached: set[int] = set()
        waiting = [*terms_in(self.now[Ref("output", "")]), *self.effects]
        while waiting:
            term = waiting.pop()
            if id(term) not in reached:
                reached.add(id(term))
                waiting += terms_in((value_operands(term), term.kwargs))
        return reached

    def _hidden_by(self, layers: Sequence[Layer], index: int) -> int | None:
        """The first layer after one at `index` without which more of its edits are computed."""
        most = -1
        for count in range(index + 1, len(layers) + 1):
            weaver = _Weaver(self.own)
            weaver.base(self.training)
            for layer in layers[:count]:
                weaver.edit(layer)
            reached = weaver._reached()
            number = sum(id(term) in reached for term in weaver.replacements[index])
            if number < most:
                return count - 1
            most = number
        return None

    def _counted(self, needed: dict[int, Term]) -> None:
        """Let what edits run more than once see to it that it may: the own forward as it is, a module, an object."""
        same: dict[tuple, list[Term]] = {}
        for term in needed.values():
            if term.target is base_forward and (term is self.call or not term.args[1]):
                same.setdefault((base_forward,), []).append(term)
            elif term.op == "call_module" or term.op == "call_method" and not hasattr(Tensor, term.target):
                same.setdefault((term.op, term.target), []).append(term)
        for (kind, *_), runs in same.items():
            origin = next((term.origin for term in runs if term.origin), "")
            if len(runs) < 2 or not origin:  # what the forward itself does twice is the model's
                continue
            counter = self._term("call_function", Runs, (len(runs),), origin=origin)
            for term in runs:
                if kind is base_forward:
                    term.target, term.args = repeated, (counter, *term.args)
                    continue
                path = term.target if kind == "call_module" else "_surgery_self"
                given = (self._term("get_attr", path), *(() if kind == "call_module" else (term.target,)))
                function = repeated_module if kind == "call_module" else repeated_method
                term.op, term.target = "call_function", function
                term.args, term.kwargs = (counter, *given, tuple(term.args), term.kwargs), {}

    def _check_order(self, graph: fx.Graph) -> None:
        """Refuse rewrites that write in place, if their lines had to be put in another order."""
        at = {node: index for index, node in enumerate(graph.nodes)} if self.ordered else {}
        for origin, made in self.ordered:
            lines = [at[term.node] for term in made if term.node is not None]
            if lines != sorted(lines):
                raise SiteError(
                    f"the lines of {origin or 'the forward'} can't keep the order in which they are written",
                    why="it writes in place, and a value is replaced by what is computed after it is used",
                    fix="write x + y in the place of x.add_(y), or replace values in the order of the forward",
                )

    def _nodes(self, value: Any, graph: fx.Graph) -> Any:
        return mapped(value, lambda term: self._write(term, graph))

    def _write(self, term: Term, graph: fx.Graph) -> fx.Node:
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
                now.node.meta["surgery"] = now.origin
                if now.writes:
                    now.node.meta["writes"] = True
                elif draws(now.op, now.target, now.args, now.kwargs):
                    now.node.meta["draws"] = True
                elif id(now) in self.needed:
                    now.node.meta["needed"] = True
        assert term.node is not None
        return term.node


# Inputs that come before a forward's own: what tells which rows are whose, the output, functions and objects it keeps.
ROWS, OUTPUT, KEPT = "_surgery_rows", "_surgery_output", "_surgery_kept"


def _leaves_a_trace(node: fx.Node) -> bool:
    return bool({"writes", "draws"} & node.meta.keys()) or is_foreign(node.op, node.target)


def _alone(after: Term, before: Term) -> bool:
    """Whether an output that is cast already needs nothing of the one before, which then is not computed."""
    casts = (after.op, after.target) == ("call_method", "to") or after.target is in_dtype
    if not casts and not getattr(after.target, "keeps_dtype", False):
        return False
    return all(term is not behind(before) for term in sources_of(after))


def _known(seen: dict[Ref, Any]) -> str:
    names = [str(ref.key) for ref in seen if ref.kind == "input"]
    return f"its inputs are {', '.join(names)}" if names else "it takes no named inputs"
