"""Tapes → one fx graph: the site's own forward with the edits of every live rule woven in.

The edits are applied to a small graph of terms first and written as fx nodes last, in an order in which every value
is made before it is used. What a rule put something else in the place of stays where it is still needed and is left
out where nothing needs it, so no fx node is ever erased, moved or re-inserted.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from surgery.complexes import is_number
from surgery.errors import SiteError
from surgery.lowering import in_dtype, lower, same_dtype, weighted
from surgery.own import Own, recorded_own
from surgery.repeated import Runs, left_out, repeated, repeated_method, repeated_module
from surgery.starred import FIRST, first_given, first_names, hidden_first, starred_of, with_first
from surgery.tape import Ref, Step, Tape, thawed
from surgery.view import base_forward, call_child

__all__ = ["Layer", "called_around", "plain", "trace_site", "woven", "woven_edit", "woven_held"]


class Layer(NamedTuple):
    """One rule's edits at a site, under its adapter's name. What they change is multiplied by `weight`."""

    adapter: str
    label: str
    tape: Tape
    weight: float = 1.0


@dataclass(eq=False)
class _Term:
    """One value of the forward to be: an fx node before it is written."""

    op: str
    target: Any
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    origin: str = ""
    node: fx.Node | None = None
    open: bool = False
    around: bool = False  # a call of `called_around`


def woven(own: Own, layers: Sequence[Layer], training: bool, lowered: bool = True) -> fx.Graph:
    """The graph of the site's forward with the layers' edits, in training or evaluation mode.

    `lowered=False` keeps the rules' own form, without the fast forms of `surgery.lowering`. Raises `SiteError`
    where an edit would need a value before it is made.
    """
    weaver = _Weaver(own)
    weaver.base(training)
    for layer in layers:
        weaver.edit(layer)
    graph = weaver.written()
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
    return weaver.written(), weaver.kept


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
        self.terms: list[_Term] = []
        self.effects: list[_Term] = []  # terms whose result nobody uses: run for what they do
        self.call: _Term | None = None  # an opaque site's call of its base
        self.kept: dict[str, Any] = {}  # functions that rules put others around

    def base(self, training: bool) -> None:
        self._inputs(training)
        if self.own.held is not None:
            self.effects = self._unused(self._operations(self.own.held))
        elif self.own.tapes is None:
            self.call = self._opaque({}, {})
            self.now[Ref("output", "")] = self.call
        else:
            self.effects = self._unused(self._play(self.own.tapes[training], "", ""))
        self.now[Ref("base", "")] = self.now[Ref("output", "")]

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

    def _with_first(self, new: Any, origin: str) -> dict[str, _Term]:
        """The forward's `*args` and `**kwargs` with another first input, by their names."""
        values = (first_names(self.own.base), new, *self._starred())
        given = self._term("call_function", with_first, values, origin=origin)
        at = {"*": 0, "**": 1}
        return {
            name: self._term("call_function", operator.getitem, (given, at[star]), origin=origin)
            for star, name in starred_of(self.own.signature).items()
        }

    def _operations(self, graph: fx.Graph) -> list[_Term]:
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
                self.now[Ref("made", node.name)] = terms[node]
            self.now[Ref("inside", node.name)] = terms[node]
        return [term for node, term in terms.items() if node.op.startswith("call_")]

    def _kept(self, name: str) -> _Term:
        return self._term("call_function", operator.getitem, (self._before(KEPT), name))

    def _before(self, name: str) -> _Term:
        """An input that comes before the forward's own."""
        ref = Ref("input", name)
        if ref not in self.now:
            self.now[ref] = self._term("placeholder", name)
        return self.now[ref]

    def _unused(self, made: list[_Term]) -> list[_Term]:
        used = {id(inner) for term in self.terms for inner in _terms_in((term.args, term.kwargs))}
        used |= {id(term) for term in _terms_in(self.now[Ref("output", "")])}
        return [term for term in made if id(term) not in used]

    def _opaque(self, inputs: dict[str, Any], tensors: dict[str, Any], origin: str = "") -> _Term:
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
                node = _node_of(step, thawed(step.args, resolve))
                ops[index] = self._term(*node, thawed(step.kwargs, resolve), origin)
        return output

    def edit(self, layer: Layer) -> None:
        origin = f"{layer.label} [{layer.adapter}]"
        before = self.now[Ref("output", "")]
        made = self._play(layer.tape, layer.adapter, origin, layer.weight)
        if in_place := [term for term in made if _in_place(term)]:
            self.effects += self._unused(in_place)
        after = self.now[Ref("output", "")]
        if after is not before and isinstance(after, _Term) and isinstance(before, _Term) and not _alone(after, before):
            # A module's output keeps its dtype, whatever precision an adapter computes in.
            self.now[Ref("output", "")] = self._term("call_function", same_dtype, (after, before), origin=origin)

    def _play(self, tape: Tape, adapter: str, origin: str, weight: float = 1.0) -> list[_Term]:
        """Run a tape's steps. All it names is what stood there before the tape; `replace` acts on what came before."""
        seen = dict(self.now)
        earlier = list(self.terms)
        made: list[_Term] = []

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
            if ref not in seen:
                raise SiteError(f"the forward has no {ref.kind} {ref.key!r}", fix=_known(seen))
            return seen[ref]

        ops: dict[str | int, Any] = {}
        for index, step in enumerate(tape.steps):
            if step.kind == "replace":
                self._replace(step, resolve, earlier, weight)
            elif step.kind == "around":
                values, at = thawed(step.args, resolve), thawed(step.kwargs, resolve)["at"]
                self._around(self._term("call_function", step.target, values, origin=origin), at)
            elif step.kind == "own":
                ops[index] = self._again(thawed(step.args, resolve), thawed(step.kwargs, resolve), origin)
            else:
                args, kwargs = thawed(step.args, resolve), thawed(step.kwargs, resolve)
                ops[index] = self._term(*_node_of(step, args), kwargs, origin)
                made.append(ops[index])
        return made

    def _around(self, made: _Term, at: _Term | None) -> None:
        if at is not None:
            self._wrap(at, made)
        elif self.own.held is not None:
            if any("registry" in node.meta for node in self.own.held.nodes):
                raise SiteError(
                    f"{made.origin} can't put a function around those that the forward takes from registries",
                    why="another rule goes through them (site.find with leaves=False): there is no call to be around",
                    fix="apply one of the two rules, or put both edits into one rule",
                )
            for term in [term for term in self.terms if _takes_module(term)]:
                self._wrap(term, made)
        elif self.call is not None:
            inner, around = self.call.args[:6], self.call.args[6:] or ((),)
            self.call.args = (*inner, (*around[0], made))
        else:
            raise SiteError("a forward that is held as operations takes no functions from a registry")

    def _wrap(self, term: _Term, made: _Term) -> None:
        """Put what `made` gives around the function that a term calls."""
        if not term.around:
            name = f"_around_{len(self.kept)}"
            self.kept[name] = term.target
            function = self._kept(name)
            term.target, term.args, term.around = called_around, (function, (), *term.args), True
        term.args = (term.args[0], (*term.args[1], made), *term.args[2:])

    def _replace(self, step: Step, resolve: Any, earlier: list[_Term], weight: float) -> None:
        ref, frozen = step.args
        new = thawed(frozen, resolve)
        if weight != 1.0:
            new = self._weighted(resolve(ref), new, weight)
        if ref == Ref("output", ""):
            self.now[ref] = new
            return
        old = resolve(ref)
        if ref.kind == "inside":
            new = self._in_dtype_of(str(ref.key), new, old)
        only = [resolve(user) for user in step.kwargs]
        for term in only or earlier:
            term.args, term.kwargs = _swapped(term.args, old, new), _swapped(term.kwargs, old, new)
        if ref.kind == "state" and self.call is not None:
            itself, tensors, *rest = self.call.args
            self.call.args = (itself, {**tensors, str(ref.key): new}, *rest)
        elif ref.kind == "state":
            self._give_to_child(str(ref.key), new)
        if not only:
            output = Ref("output", "")
            self.now[output] = _swapped(self.now[output], old, new)
        self.now[ref] = new
        if ref == Ref("input", FIRST):
            for name, given in self._with_first(new, new.origin if isinstance(new, _Term) else "").items():
                before = self.now[Ref("input", name)]
                for term in (term for term in earlier if term.target is not first_given):
                    term.args, term.kwargs = _swapped(term.args, before, given), _swapped(term.kwargs, before, given)
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
        if isinstance(new, _Term) and new.target is operator.add and sum(item is old for item in new.args) == 1:
            added = next(item for item in new.args if item is not old)
            scale: Any = weight
            if isinstance(added, _Term) and added.target is operator.mul and type(added.args[1]) in (int, float):
                added, scale = added.args[0], added.args[1] * weight
            change = self._term("call_function", operator.mul, (added, scale), origin=new.origin)
            return self._term("call_function", operator.add, (old, change), origin=new.origin)
        origin = new.origin if isinstance(new, _Term) else ""
        return self._term("call_function", weighted, (old, new, weight), origin=origin)

    def _in_dtype_of(self, name: str, new: Any, old: _Term) -> Any:
        """A value inside a forward keeps its dtype, whatever precision an adapter computes in: code may go by it."""
        node = next(node for node in self.own.held.nodes if node.name == name) if self.own.held is not None else None
        dtype = node.meta.get("dtype") if node is not None else None
        if dtype is None or not is_number(dtype) or not isinstance(new, _Term):
            return new
        return self._term("call_function", in_dtype, (new, dtype), origin=new.origin or old.origin)

    def _state(self, seen: dict[Ref, Any], path: str) -> Any:
        ref = Ref("state", path)
        if ref not in seen:
            found = self._term("get_attr", path)
            seen[ref] = found
            self.now.setdefault(ref, found)
        return seen[ref]

    def _term(self, op: str, target: Any, args: Any = (), kwargs: Any = None, origin: str = "") -> _Term:
        term = _Term(op, target, args, {} if kwargs is None else kwargs, origin)
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
        needed: dict[int, _Term] = {}
        waiting = [*_terms_in(output), *self.effects]
        while waiting:
            term = waiting.pop()
            if id(term) not in needed:
                needed[id(term)] = term
                waiting += _terms_in((term.args, term.kwargs))
        self._counted(needed)
        if self.call is not None and id(self.call) not in needed and len(self.own.signature.parameters) > 1:
            itself, _, *given = self.call.args[:6]
            self.effects.append(self._term("call_function", left_out, (itself, *given)))
        for term in self.terms:  # the base's operations keep their order, for what they write in place
            if id(term) in needed and not term.origin:
                self._write(term, graph)
        for term in self.effects:
            self._write(term, graph)
        graph.output(self._nodes(output, graph))
        return graph

    def _counted(self, needed: dict[int, _Term]) -> None:
        """Let what edits run more than once see to it that it may: the own forward as it is, a module, an object."""
        same: dict[tuple, list[_Term]] = {}
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

    def _nodes(self, value: Any, graph: fx.Graph) -> Any:
        return _mapped(value, lambda term: self._write(term, graph))

    def _write(self, term: _Term, graph: fx.Graph) -> fx.Node:
        waiting = [term]  # not by recursion: each live adapter adds to what the one before it made
        while waiting:
            now = waiting[-1]
            lacking = [] if now.node is not None else [t for t in _terms_in((now.args, now.kwargs)) if t.node is None]
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
            if now.node is None:
                args, kwargs = (_mapped(value, lambda made: made.node) for value in (now.args, now.kwargs))
                now.node = graph.create_node(now.op, now.target, args, kwargs)
                now.node.meta["surgery"] = now.origin
        assert term.node is not None
        return term.node


def called_around(function: Any, around: tuple, *args: Any, **kwargs: Any) -> Any:
    """`function(*args)` with functions around it, the last one outermost."""
    for outer in around:
        function = functools.partial(outer, function)
    return function(*args, **kwargs)


def _takes_module(term: _Term) -> bool:
    """Whether it calls a function from a registry: the only ones in a traced graph that are given a module."""
    if term.op != "call_function" or term.origin:
        return False
    args = term.args[2:] if term.around else term.args
    first = args[0] if args else None
    return isinstance(first, _Term) and (first.op, first.target) == ("get_attr", "_surgery_self")


def plain(value: Any, shown: Callable[[fx.Node], Any]) -> Any:
    """An argument of a node of fx in plain containers, with what `shown` gives for nodes."""
    if isinstance(value, fx.Node):
        return shown(value)
    if isinstance(value, (tuple, list)):
        items = [plain(item, shown) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {key: plain(item, shown) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(plain(item, shown) for item in (value.start, value.stop, value.step)))
    return value


# Inputs that come before a forward's own: what tells which rows are whose, the output, functions and objects it keeps.
ROWS, OUTPUT, KEPT = "_surgery_rows", "_surgery_output", "_surgery_kept"


def _node_of(step: Step, args: Any) -> tuple[str, Any, Any]:
    if step.kind == "attribute":
        return "call_function", getattr, (*args, step.target)
    kinds = {"function": "call_function", "method": "call_method", "module": "call_module"}
    return kinds[step.kind], step.target, args


def _in_place(term: _Term) -> bool:
    name = term.target if isinstance(term.target, str) else getattr(term.target, "__name__", "")
    return term.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")


def _alone(after: _Term, before: _Term) -> bool:
    """Whether an output that is cast already needs nothing of the one before, which then is not computed."""
    casts = (after.op, after.target) == ("call_method", "to") or after.target is in_dtype
    if not casts and not getattr(after.target, "keeps_dtype", False):
        return False
    seen: set[int] = set()
    waiting = [after]
    while waiting:
        term = waiting.pop()
        if term is before:
            return False
        if id(term) not in seen:
            seen.add(id(term))
            waiting += _terms_in((term.args, term.kwargs))
    return True


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, _Term):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(item, change) for item in (value.start, value.stop, value.step)))
    return value


def _swapped(value: Any, old: _Term, new: Any) -> Any:
    return _mapped(value, lambda term: new if term is old else term)


def _terms_in(value: Any) -> list[_Term]:
    found: list[_Term] = []
    _mapped(value, lambda term: found.append(term))
    return found


def _known(seen: dict[Ref, Any]) -> str:
    names = [str(ref.key) for ref in seen if ref.kind == "input"]
    return f"its inputs are {', '.join(names)}" if names else "it takes no named inputs"
