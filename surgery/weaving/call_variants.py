"""Sites whose rules look into the forward: one generated forward for each kind of call, made when it is first met.

A kind is the mode, autocast, and which arguments are given in which form (`surgery.tracing.traced_forward`). A new one
is traced in the midst of the call, on copies; the site's rules are asked again for its graph, and their tensors stay
the ones they have. Graphs are shared by modules that are alike, code by sites whose edits are equal. Where
torch.compile or torch.export goes through the call, the variant is made outside of them
(`surgery.tracing.compiler_thread`), before they come to it.
"""

from __future__ import annotations

import linecache
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx, nn

from surgery.authoring.planned_rule import PlannedRule
from surgery.authoring.site_facts import THROUGH
from surgery.errors import SiteError, SurgeryError, SurgeryWarning, TraceError
from surgery.forward.own_forward import OwnForward, own_forward, signature_of
from surgery.forward.tape import Layer
from surgery.state.records import Applied, SiteState
from surgery.tracing import compiled_call
from surgery.tracing.call_kind import describe_difference, kind_of_call, predicate_of_kind
from surgery.tracing.compiler_thread import has_fakes, replace_fakes, replace_symbols, run_in_thread
from surgery.tracing.decisions import OtherDecision
from surgery.tracing.traced_forward import TracedForward, known_forwards, trace_anew
from surgery.weaving.forward_source import body_of, signature_source
from surgery.weaving.generated_class import Recipe, class_from, told
from surgery.weaving.rewrite_recording import PassedOver, layer_of, recorded
from surgery.weaving.weave import woven_held

__all__ = [
    "LIMIT",
    "Variant",
    "function_of",
    "held_own",
    "layer_at",
    "layers_in",
    "leaves_of",
    "make_ready",
    "varied",
    "varied_class",
]

LIMIT = 32  # forms of one site for calls of one kind, which decide otherwise on sizes


@dataclass(frozen=True, eq=False)
class Variant:
    """A forward for calls of one kind, told by `fits(module, …)`: `run(module, kept, …)`."""

    kind: tuple
    fits: Callable[..., bool]
    held: TracedForward
    run: Callable[..., Any]
    kept: Mapping[str, Any]
    source: str
    sizes: tuple  # of the arguments that it was made with


def varied_class(base: type[nn.Module], live: Sequence[Applied]) -> type[nn.Module]:
    """The class of sites with rules that look into the forward: at each call it chooses among variants."""
    own = OwnForward(base, signature_of(base), None)
    signature, names = signature_source(own.signature)
    given = "".join(f"{name}, " for name in own.signature.parameters)
    lines = [
        f"def forward({signature}):",
        "    try:",
        f"        return _surgery_varied(self, ({given}))",
        "    except Exception as error:",
        "        raise _surgery_told(error, self)",
    ]
    label = f"{base.__name__} + " + ", ".join(f"{applied.rule.label} [{applied.adapter}]" for applied in live)
    return class_from(
        Recipe(base, "\n".join(lines) + "\n", {**names, "_surgery_varied": varied, "_surgery_told": told}, label)
    )


def varied(module: nn.Module, given: tuple) -> Any:
    """The rewritten forward of a site, for this call."""
    if torch.compiler.is_dynamo_compiling():
        from torch._dynamo.comptime import comptime

        comptime(_before_reading)
    state: SiteState = module.__dict__["_surgery_site"]
    for variant in state.variants:
        if variant.fits(module, *given):
            try:
                return variant.run(module, variant.kept, *given)
            except OtherDecision as other:
                _check_early(other, module)
    if torch.compiler.is_dynamo_compiling():
        from torch._dynamo.comptime import comptime

        comptime(_after_reading)
    return _uncompiled(module, state, given)


def _uncompiled(module: nn.Module, state: SiteState, given: tuple) -> Any:
    """`_anew`, which no compiler goes through: where compiled code calls it, its graph breaks."""
    disable: Any = torch.compiler.disable
    run = disable(_anew) if "torch._dynamo" in sys.modules else _anew
    return run(module, state, given)


_uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined]  # torch.compiler.disable would import Dynamo


def _anew(module: nn.Module, state: SiteState, given: tuple) -> Any:
    """Run a variant of a graph that modules like this one have already, or of a new one."""
    fake = has_fakes(module, given)
    shown, values = run_in_thread(replace_fakes, module, given) if fake else (module, given)
    kind = kind_of_call(module, values)
    for held in (*_unused(shown, state, kind), None):
        if held is None:
            _check_number(state, kind)
        variant = run_in_thread(_variant, shown, state, values, held) if fake else _variant(shown, state, values, held)
        try:
            found = variant.run(module, variant.kept, *given)
        except OtherDecision as other:
            _check_early(other, module)
            if held is None:  # the graph is of this very call
                what = f"{state.base.__name__}.forward decides by something that changes"
                raise TraceError(what, where=other.where) from other
        else:
            state.variants.insert(0, variant)
            return found


def make_ready(module: nn.Module, state: SiteState, given: tuple, again: bool = False) -> bool:
    """Make variants for calls like this one before it is run; whether there are new ones.

    `again`: no variant that the site has fits the call, though it is of a known kind.
    """
    kind = kind_of_call(module, given)
    made = [_variant(module, state, given, held) for held in _unused(module, state, kind)]
    known = [variant for variant in state.variants if variant.kind == kind and variant.fits(module, *given)]
    if not made and (again or not known) and not any(variant.sizes == _sizes(given) for variant in known):
        _check_number(state, kind)
        made = [_variant(module, state, given)]
    state.variants += made  # after those of calls that were met
    return bool(made)


def leaves_of(applied: Iterable[Applied | PlannedRule]) -> bool:
    """Whether the graphs for these rules have functions from registries as single nodes."""
    return not any(THROUGH in one.facts for one in applied)


def _unused(module: nn.Module, state: SiteState, kind: tuple) -> list[TracedForward]:
    """The graphs known for calls of a kind that the site has no variant of."""
    used = {id(variant.held) for variant in state.variants if variant.kind == kind}
    found = known_forwards(module, own_forward(module, state.base), kind, leaves_of(state.live()))
    return [held for held in found if id(held) not in used and held.fits(module)]


def _check_number(state: SiteState, kind: tuple) -> None:
    if sum(variant.kind == kind for variant in state.variants) >= LIMIT:
        raise TraceError(
            f"{state.base.__name__}.forward decides on sizes in more than {LIMIT} ways",
            why="rules look into it, and each way has a graph of its own",
            fix="call it with fewer different sizes (pad to a multiple)",
        )


def _check_early(other: OtherDecision, module: nn.Module) -> None:
    if other.late:
        raise TraceError(
            f"{type(module).__name__}.forward decides otherwise than in the calls known so far, when it has written or "
            "drawn something already",
            where=other.where,
            why=f"{other}; rules look into it, and it can't be run once more for a graph of this call",
        ) from other


def _variant(module: nn.Module, state: SiteState, given: tuple, held: TracedForward | None = None) -> Variant:
    """The variant of a graph, or of a new one, for calls like this one."""
    own, kind = own_forward(module, state.base), kind_of_call(module, given)
    try:
        held = held or trace_anew(module, own, given, kind, leaves_of(state.live()))
        own = replace(own, tapes=None, graph=held.graph)
        layers = [layer_at(applied, module, state, own) for applied in state.live()]
    except SurgeryError as error:
        error.why = "; ".join(filter(None, (error.why, told_difference(state, kind, list(own.signature.parameters)))))
        raise
    known = held.variants.get(tuple(layers))
    if known is not None:
        return known
    graph, around = woven_held(own, layers)
    run, source = function_of(graph, f"{own.base.__name__} + " + ", ".join(f"{x.label} [{x.adapter}]" for x in layers))
    fits = predicate_of_kind(module, given, held.settings)
    made = Variant(kind, fits, held, run, {**held.constants, **around}, source, _sizes(given))
    return held.variants.setdefault(tuple(layers), made)


def told_difference(state: SiteState, kind: tuple, names: Sequence[str]) -> str:
    """In what a call differs from the calls that a site knows, in words."""
    found = describe_difference(kind, [variant.kind for variant in state.variants], names)
    return f"the call differs from those known ({found})" if found else ""


def _sizes(given: Any) -> tuple:
    """The sizes of all tensors in arguments."""
    if isinstance(given, torch.Tensor):
        return tuple(given.shape)
    if isinstance(given, (tuple, list)):
        return tuple([_sizes(item) for item in given])
    return tuple([_sizes(item) for item in given.values()]) if type(given) is dict else ()


# What is done while torch.compile goes through a call ------------------------------------------------------------


def _before_reading(context: Any) -> None:
    """Before Dynamo reads which variants a site has: the one for the call at hand is made, outside of Dynamo."""
    try:
        module, given = compiled_call.call_of(context)
        first = compiled_call.is_first(context, module)
        made = _ready_apart(module, given)
    except Exception:  # told in `_after_reading`, where it turns out that no variant fits
        return
    if made and not first:
        compiled_call.restart("a site met another kind of call")


def _after_reading(context: Any) -> None:
    """No variant is right for the call: one is made and Dynamo begins anew, or the graph breaks here."""
    module, made, error = None, False, None
    try:
        module, given = compiled_call.call_of(context)
        made = _ready_apart(module, given, again=True)
    except Exception as one:
        error = one
    if made:
        compiled_call.restart("a site met another kind of call")
    if not isinstance(error, SurgeryError):
        why = (
            f"{type(error).__name__}: {error}" if error is not None else "it decides on what the compiler does not know"
        )
        fix = "run the model once on such a call before, or give apply_rules such an example in a list of them"
        error = TraceError("it can't be traced while it is compiled", why=why, fix=fix)
    context.graph_break(f"a new kind of call of a module whose forward rules look into: {error}")


def _ready_apart(module: nn.Module, given: tuple, again: bool = False) -> bool:
    state: SiteState = module.__dict__["_surgery_site"]
    given = tuple([replace_symbols(value) for value in given])
    if not again and any(variant.fits(module, *given) for variant in state.variants):
        if not _unused(module, state, kind_of_call(module, given)):
            return False
    shown, values = run_in_thread(replace_fakes, module, given)
    return run_in_thread(make_ready, shown, state, values, again)


def held_own(module: nn.Module, state: SiteState) -> OwnForward | None:
    """The forward of such a site as it is held for the kind of call met last, or None before any call."""
    if not state.variants:
        return None
    return replace(own_forward(module, state.base), tapes=None, graph=state.variants[0].held.graph)


def layers_in(held: TracedForward, module: nn.Module, state: SiteState) -> tuple[OwnForward, list[Layer]]:
    """A site's own forward as it is held for calls of one kind, and the live rules' edits in it."""
    own = replace(own_forward(module, state.base), tapes=None, graph=held.graph)
    return own, [layer_at(applied, module, state, own) for applied in state.live()]


def layer_at(applied: Applied, module: nn.Module, state: SiteState, own: OwnForward) -> Layer:
    """A rule's edits in a forward; of a rule that looks into it, those in this graph."""
    if not applied.inside or own.graph is None:
        return layer_of(applied, module, state.path, own)
    try:
        made = recorded(applied.rule, module, state.path, applied.adapter, own, facts=applied.facts)
    except PassedOver:
        made = None
    if made is None or {spec.name for spec in made.specs} != set(applied.tensors):
        raise SiteError(
            f"{applied.rule.label} does not find in this call what it found in the example",
            where=state.path,
            why="the forward does something else in calls of this kind",
            fix="call the model as in the example, or exclude this module",
        )
    for text in made.told:
        warnings.warn(text, SurgeryWarning, stacklevel=2)
    return Layer(applied.adapter, applied.rule.label, made.tape, applied.weight)


def function_of(graph: fx.Graph, label: str) -> tuple[Callable[..., Any], str]:
    """A graph's code as a function, the same one for equal code."""
    lines, names = body_of(graph)
    inputs = [str(node.target).lstrip("*") for node in graph.nodes if node.op == "placeholder"]
    source = "\n".join([f"def forward(self, {', '.join(inputs)}):", *(f"    {line}" for line in lines)])
    key = (source, tuple(sorted((name, id(value)) for name, value in names.items())))
    found = _functions.get(key)
    if found is None:
        filename = f"<surgery variant {len(_functions)}: {label}>"
        space = dict(names)
        exec(compile(source, filename, "exec"), space)
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        found = _functions[key] = space["forward"]
    return found, source


_functions: WeakValueDictionary[tuple, Callable[..., Any]] = WeakValueDictionary()
