"""Builds the variants of a site: a graph of the own forward for one kind of call, with the live rules' edits in it.

Similar modules share graphs (`surgery.tracing.traced_forward`). Sites with equal edits share the code.
"""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx, nn

from surgery.authoring.planned_rule import PlannedRule
from surgery.authoring.site_facts import depth_of
from surgery.errors import SiteError, SurgeryError, SurgeryWarning, TraceError
from surgery.forward.own_forward import OwnForward, own_forward
from surgery.forward.tape import Layer, Tape
from surgery.state.records import Applied, SiteState
from surgery.tracing.call_kind import describe_difference, kind_of_call, predicate_of_kind
from surgery.tracing.depth import Depth
from surgery.tracing.traced_forward import TracedForward, known_forwards, trace_anew
from surgery.weaving.forward_source import graph_statements
from surgery.weaving.rewrite_recording import SkippedSite, layer_of, record_rewrite
from surgery.weaving.weave import weave_traced

__all__ = [
    "LIMIT",
    "Variant",
    "build_variant",
    "check_count",
    "depth_for",
    "function_of",
    "last_traced_forward",
    "layer_at",
    "make_ready",
    "traced_layers",
    "unused_graphs",
]

LIMIT = 32  # variants of one site for one kind of call, which differ in their decisions on sizes


@dataclass(frozen=True, eq=False)
class Variant:
    """A forward for calls of one kind: `run(module, constants, …)`, for calls that `fits(module, …)` accepts.

    `sizes`: the sizes of the arguments of the call for which the variant was built.
    """

    kind: tuple
    fits: Callable[..., bool]
    traced: TracedForward
    run: Callable[..., Any]
    constants: Mapping[str, Any]
    source: str
    sizes: tuple


def make_ready(module: nn.Module, state: SiteState, arguments: tuple, again: bool = False) -> bool:
    """Build variants for calls like this one before the call runs. Returns whether there are new variants.

    `again`: none of the site's variants fits the call, although its kind is known.
    """
    kind = kind_of_call(module, arguments)
    built = [build_variant(module, state, arguments, traced) for traced in unused_graphs(module, state, kind)]
    fitting = [variant for variant in state.variants if variant.kind == kind and variant.fits(module, *arguments)]
    same_sizes = any(variant.sizes == _sizes(arguments) for variant in fitting)
    if not built and (again or not fitting) and not same_sizes:
        check_count(state, kind)
        built = [build_variant(module, state, arguments)]
    state.variants += built  # last: variants of earlier calls are tried first
    return bool(built)


def depth_for(applied: Iterable[Applied | PlannedRule]) -> Depth:
    """Returns the depth of the graphs for these rules of a site."""
    return depth_of(rule.facts for rule in applied)


def unused_graphs(module: nn.Module, state: SiteState, kind: tuple) -> list[TracedForward]:
    """Returns the known graphs for calls of a kind for which the site does not have a variant yet."""
    used = {id(variant.traced) for variant in state.variants if variant.kind == kind}
    known = known_forwards(module, own_forward(module, state.base), kind, depth_for(state.live()))
    return [traced for traced in known if id(traced) not in used and traced.fits(module)]


def check_count(state: SiteState, kind: tuple) -> None:
    """Raise `TraceError` if the site already has `LIMIT` variants for this kind of call."""
    if sum(variant.kind == kind for variant in state.variants) >= LIMIT:
        raise TraceError(
            f"{state.base.__name__}.forward decides on sizes in more than {LIMIT} ways",
            why="rules look into it, and each way has a graph of its own",
            fix="call it with fewer different sizes (pad to a multiple)",
        )


def build_variant(
    module: nn.Module, state: SiteState, arguments: tuple, traced: TracedForward | None = None
) -> Variant:
    """Returns the variant of a graph for calls like this one. Without a graph, the call is traced."""
    own, kind = own_forward(module, state.base), kind_of_call(module, arguments)
    try:
        traced = traced or trace_anew(module, own, arguments, kind, depth_for(state.live()))
        own = replace(own, tapes=None, graph=traced.graph)
        layers = layers_at(module, state, own)
    except SurgeryError as error:
        reasons = (error.why, _describe_difference(state, kind, list(own.signature.parameters)))
        error.why = "; ".join(filter(None, reasons))
        raise
    known = traced.variants.get(tuple(layers))
    if known is not None:
        return known
    graph, wrapped_functions = weave_traced(own, layers)
    run, source = function_of(graph, f"{own.base.__name__} + " + ", ".join(f"{x.label} [{x.adapter}]" for x in layers))
    fits = predicate_of_kind(module, arguments, traced.settings)
    constants = {**traced.constants, **wrapped_functions}
    variant = Variant(kind, fits, traced, run, constants, source, _sizes(arguments))
    return traced.variants.setdefault(tuple(layers), variant)


def _describe_difference(state: SiteState, kind: tuple, names: Sequence[str]) -> str:
    """Returns how a call differs from the calls that a site knows, in words."""
    text = describe_difference(kind, [variant.kind for variant in state.variants], names)
    return f"the call differs from those known ({text})" if text else ""


def _sizes(value: Any) -> tuple:
    """Returns the sizes of all tensors in arguments, nested like the arguments."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple([_sizes(item) for item in value])
    return tuple([_sizes(item) for item in value.values()]) if type(value) is dict else ()


def last_traced_forward(module: nn.Module, state: SiteState) -> OwnForward | None:
    """Returns the own forward as a graph for the kind of call that came last, or None before the first call."""
    if not state.variants:
        return None
    return replace(own_forward(module, state.base), tapes=None, graph=state.variants[0].traced.graph)


def traced_layers(variant: Variant, module: nn.Module, state: SiteState) -> tuple[OwnForward, list[Layer]]:
    """Returns a site's own forward with the graph of a variant, and the live rules' edits in the graph."""
    own = replace(own_forward(module, state.base), tapes=None, graph=variant.traced.graph)
    return own, layers_at(module, state, own, variant.kind[0])


def layers_at(module: nn.Module, state: SiteState, own: OwnForward, training: bool | None = None) -> list[Layer]:
    """Returns the live rules' edits in a forward. Rules of one adapter do not replace the same operations.

    `training`: the mode of the forward's graph; default: the module's present mode.
    """
    claims: dict[str, dict[str, str]] = {}
    return [
        layer_at(applied, module, state, own, claims.setdefault(applied.adapter, {}), training)
        for applied in state.live()
    ]


def layer_at(
    applied: Applied,
    module: nn.Module,
    state: SiteState,
    own: OwnForward,
    claims: dict[str, str] | None = None,
    training: bool | None = None,
) -> Layer:
    """Returns a rule's edits in a forward. A rule that looks into the forward is recorded again in its graph.

    `claims`: the operations that earlier rules of the adapter replace; those of this rule are added. `training`: as for
    `layers_at`.
    """
    claims = {} if claims is None else claims
    if not applied.inside or own.graph is None:
        return layer_of(applied, module, state.path, own)
    try:
        recording = record_rewrite(
            *(applied.rule, module, state.path, applied.adapter, own),
            facts=applied.facts,
            claimed=claims,
            training=training,
        )
    except SkippedSite:
        if applied.rule.skips_calls:
            return Layer(applied.adapter, applied.rule.label, Tape(state.path).intern(), applied.weight)
        recording = None
    if recording is None or {spec.name for spec in recording.specs} != set(applied.tensors):
        raise SiteError(
            f"{applied.rule.label} does not find in this call what it found in the example",
            where=state.path,
            why="the forward does something else in calls of this kind",
            fix="call the model as in the example, or exclude this module",
        )
    claims |= recording.claims
    told: set[str] = vars(applied.standing).setdefault("told", set())  # warnings of the adapter, without their places
    where = f" at {state.path or 'the model itself'}"
    texts = {text.replace(where, ""): text for text in recording.warnings}
    for text in [text for key, text in texts.items() if key not in told]:
        warnings.warn(text, SurgeryWarning, stacklevel=2)
    told.update(texts)
    return Layer(applied.adapter, applied.rule.label, recording.tape, applied.weight)


def function_of(graph: fx.Graph, label: str) -> tuple[Callable[..., Any], str]:
    """Compile a graph's code. Returns the function, the same for equal code, and its source."""
    lines, names = graph_statements(graph)
    inputs = [str(node.target).lstrip("*") for node in graph.nodes if node.op == "placeholder"]
    source = "\n".join([f"def forward(self, {', '.join(inputs)}):", *(f"    {line}" for line in lines)])
    key = (source, tuple(sorted((name, id(value)) for name, value in names.items())))
    function = _functions.get(key)
    if function is None:
        filename = f"<surgery variant {len(_functions)}: {label}>"
        namespace = dict(names)
        exec(compile(source, filename, "exec"), namespace)
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        function = _functions[key] = namespace["forward"]
    return function, source


_functions: WeakValueDictionary[tuple, Callable[..., Any]] = WeakValueDictionary()
