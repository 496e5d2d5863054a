"""Sites whose rules look into the forward: one generated forward for each kind of call, made when it is first met.

A kind is the mode, autocast, and which arguments are given in which form (`surgery.held`). A new one is traced in the
midst of the call, on copies; the site's rules are asked again for its graph, and their tensors stay the ones they have.
Graphs are shared by modules that are alike, code by sites whose edits are equal.
"""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

from torch import fx, nn

from surgery.deciding import Otherwise
from surgery.errors import SiteError, SurgeryWarning, TraceError
from surgery.held import Held, held_forwards, new_held
from surgery.install import Recipe, body_of, class_from, signature_source, told
from surgery.kinds import kind_of_call, predicate_of_kind
from surgery.own import Own, own_forward, signature_of
from surgery.recording import PassedOver, layer_of, recorded
from surgery.state import THROUGH, Applied, SiteState
from surgery.weave import Layer, woven_held

__all__ = ["LIMIT", "function_of", "held_own", "layer_at", "varied", "varied_class"]

LIMIT = 32  # forms of one site for calls of one kind, which decide otherwise on sizes


@dataclass(frozen=True, eq=False)
class Variant:
    """A forward for calls of one kind, told by `fits(module, …)`: `run(module, kept, …)`."""

    kind: tuple
    fits: Callable[..., bool]
    held: Held
    run: Callable[..., Any]
    kept: Mapping[str, Any]
    source: str


def varied_class(base: type[nn.Module], live: Sequence[Applied]) -> type[nn.Module]:
    """The class of sites with rules that look into the forward: at each call it chooses among variants."""
    own = Own(base, signature_of(base), None)
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
    state: SiteState = module.__dict__["_surgery_site"]
    for variant in state.variants:
        if variant.fits(module, *given):
            try:
                return variant.run(module, variant.kept, *given)
            except Otherwise as other:
                _check_early(other, module)
    return _anew(module, state, given)


def _anew(module: nn.Module, state: SiteState, given: tuple) -> Any:
    """Make a variant of a graph that modules like this one have already, or of a new one."""
    own, kind = own_forward(module, state.base), kind_of_call(module, given)
    leaves = not any(THROUGH in applied.facts for applied in state.live())
    known = [variant.held for variant in state.variants if variant.kind == kind]
    for held in list(held_forwards(module, own, kind, leaves)):
        if held.fits(module) and not any(held is other for other in known):
            try:
                return _run_anew(module, state, own, held, kind, given)
            except Otherwise as other:
                _check_early(other, module)
    if len(known) >= LIMIT:
        raise TraceError(
            f"{own.base.__name__}.forward decides on sizes in more than {LIMIT} ways",
            why="rules look into it, and each way has a graph of its own",
            fix="call it with fewer different sizes (pad to a multiple)",
        )
    try:
        return _run_anew(module, state, own, new_held(module, own, given, kind, leaves), kind, given)
    except Otherwise as other:  # the graph is of this very call
        raise TraceError(f"{own.base.__name__}.forward decides by something that changes", where=other.where) from other


def _run_anew(module: nn.Module, state: SiteState, own: Own, held: Held, kind: tuple, given: tuple) -> Any:
    variant = _variant(module, state, own, held, kind, given)
    found = variant.run(module, variant.kept, *given)
    state.variants.insert(0, variant)
    return found


def _check_early(other: Otherwise, module: nn.Module) -> None:
    if other.late:
        raise TraceError(
            f"{type(module).__name__}.forward decides otherwise than in the calls known so far, when it has written or "
            "drawn something already",
            where=other.where,
            why=f"{other}; rules look into it, and it can't be run once more for a graph of this call",
        ) from other


def _variant(module: nn.Module, state: SiteState, own: Own, held: Held, kind: tuple, given: tuple) -> Variant:
    own = replace(own, tapes=None, held=held.graph)
    layers = [layer_at(applied, module, state, own) for applied in state.live()]
    graph, around = woven_held(own, layers)
    run, source = function_of(graph, f"{own.base.__name__} + " + ", ".join(f"{x.label} [{x.adapter}]" for x in layers))
    fits = predicate_of_kind(module, given, held.settings)
    return Variant(kind, fits, held, run, {**held.kept, **around}, source)


def held_own(module: nn.Module, state: SiteState) -> Own | None:
    """The forward of such a site as it is held for the kind of call met last, or None before any call."""
    if not state.variants:
        return None
    return replace(own_forward(module, state.base), tapes=None, held=state.variants[0].held.graph)


def layer_at(applied: Applied, module: nn.Module, state: SiteState, own: Own) -> Layer:
    """A rule's edits in a forward; of a rule that looks into it, those in this graph."""
    if not applied.inside or own.held is None:
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
