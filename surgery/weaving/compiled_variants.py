"""Builds variants of a site while torch.compile compiles a call of the site. The work runs outside the compiler."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.errors import SurgeryError, TraceError
from surgery.state.records import SiteState
from surgery.tracing import compiled_call
from surgery.tracing.call_kind import kind_of_call
from surgery.tracing.compiler_thread import replace_fakes, replace_symbols, run_in_thread
from surgery.weaving.variant_building import make_ready, unused_graphs

__all__ = ["build_or_break", "build_quietly"]


def build_quietly(context: Any) -> None:
    """Build the variant for the call at hand before Dynamo reads the site's variants."""
    try:
        module, arguments = compiled_call.call_of(context)
        first = compiled_call.is_first(context, module)
        built = _build_apart(module, arguments)
    except Exception:  # `build_or_break` reports it, if no variant fits the call
        return
    if built and not first:
        compiled_call.restart("a site met another kind of call")


def build_or_break(context: Any) -> None:
    """Build a variant when none fits the call, and restart Dynamo. If that fails, break the graph with the reason."""
    built, failure = False, None
    try:
        module, arguments = compiled_call.call_of(context)
        built = _build_apart(module, arguments, again=True)
    except Exception as error:
        failure = error
    if built:
        compiled_call.restart("a site met another kind of call")
    if not isinstance(failure, SurgeryError):
        why = "it decides on what the compiler does not know"
        if failure is not None:
            why = f"{type(failure).__name__}: {failure}"
        fix = "run the model once on such a call before, or give apply_rules such an example in a list of them"
        failure = TraceError("it can't be traced while it is compiled", why=why, fix=fix)
    context.graph_break(f"a new kind of call of a module whose forward rules look into: {failure}")


def _build_apart(module: nn.Module, arguments: tuple, again: bool = False) -> bool:
    """Call `make_ready` in another thread, with real tensors in place of the compiler's fake ones."""
    state: SiteState = module.__dict__["_surgery_site"]
    arguments = tuple([replace_symbols(value) for value in arguments])
    if not again and any(variant.fits(module, *arguments) for variant in state.variants):
        if not unused_graphs(module, state, kind_of_call(module, arguments)):
            return False
    real_module, values = run_in_thread(replace_fakes, module, arguments)
    return run_in_thread(make_ready, real_module, state, values, again)
