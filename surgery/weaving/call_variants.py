"""The forward of sites whose rules look into the forward: each call runs the generated forward of its kind of call.

A kind of call is the module's mode, autocast, and which arguments are passed in which form. The first call of a new
kind is traced during the call, on copies. The site's rules are recorded again in the new graph and keep their tensors.
Under torch.compile and torch.export, the variant is built outside the compiler (`surgery.weaving.compiled_variants`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from surgery.errors import TraceError
from surgery.forward.own_forward import OwnForward, signature_of
from surgery.state.records import Applied, SiteState
from surgery.tracing.call_kind import kind_of_call
from surgery.tracing.compiler_thread import has_fakes, replace_fakes, run_in_thread
from surgery.tracing.decisions import OtherDecision
from surgery.weaving.compiled_variants import build_or_break, build_quietly
from surgery.weaving.forward_source import signature_source
from surgery.weaving.generated_class import Recipe, class_from, explain_error
from surgery.weaving.variant_building import build_variant, check_count, unused_graphs

__all__ = ["run_variant", "variant_class"]


def variant_class(base: type[nn.Module], live: Sequence[Applied]) -> type[nn.Module]:
    """Returns the class of sites with rules that look into the forward. Its forward chooses a variant at each call."""
    own = OwnForward(base, signature_of(base), None)
    signature, names = signature_source(own.signature)
    arguments = "".join(f"{name}, " for name in own.signature.parameters)
    lines = [
        f"def forward({signature}):",
        "    try:",
        f"        return _surgery_run_variant(self, ({arguments}))",
        "    except Exception as error:",
        "        raise _surgery_explain_error(error, self)",
    ]
    names |= {"_surgery_run_variant": run_variant, "_surgery_explain_error": explain_error}
    label = f"{base.__name__} + " + ", ".join(f"{applied.rule.label} [{applied.adapter}]" for applied in live)
    return class_from(Recipe(base, "\n".join(lines) + "\n", names, label))


def run_variant(module: nn.Module, arguments: tuple) -> Any:
    """Run the rewritten forward of a site for this call.

    `compiled_call.call_of` reads the locals `module` and `arguments` by name.
    """
    if torch.compiler.is_dynamo_compiling():
        from torch._dynamo.comptime import comptime

        comptime(build_quietly)
    state: SiteState = module.__dict__["_surgery_site"]
    for variant in state.variants:
        if variant.fits(module, *arguments):
            try:
                return variant.run(module, variant.constants, *arguments)
            except OtherDecision as decision:
                _refuse_late(decision, module)
    if torch.compiler.is_dynamo_compiling():
        from torch._dynamo.comptime import comptime

        comptime(build_or_break)
    return _run_uncompiled(module, state, arguments)


def _run_uncompiled(module: nn.Module, state: SiteState, arguments: tuple) -> Any:
    """Call `_run_new_variant` outside a compiler. Compiled code that calls it has a graph break here."""
    disable: Any = torch.compiler.disable
    run = disable(_run_new_variant) if "torch._dynamo" in sys.modules else _run_new_variant
    return run(module, state, arguments)


_run_uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined]  # torch.compiler.disable would import Dynamo


def _run_new_variant(module: nn.Module, state: SiteState, arguments: tuple) -> Any:
    """Build and run a variant: from a known graph of similar modules that fits the call, else from a new trace."""
    fake = has_fakes(module, arguments)
    real_module, values = run_in_thread(replace_fakes, module, arguments) if fake else (module, arguments)
    kind = kind_of_call(module, values)
    for traced in (*unused_graphs(real_module, state, kind), None):
        if traced is None:
            check_count(state, kind)
        call = (real_module, state, values, traced)
        variant = run_in_thread(build_variant, *call) if fake else build_variant(*call)
        try:
            output = variant.run(module, variant.constants, *arguments)
        except OtherDecision as decision:
            _refuse_late(decision, module)
            if traced is None:  # the graph was traced from this very call
                what = f"{state.base.__name__}.forward decides by something that changes"
                raise TraceError(what, where=decision.where) from decision
        else:
            state.variants.insert(0, variant)
            return output


def _refuse_late(decision: OtherDecision, module: nn.Module) -> None:
    """Raise `TraceError` if the forward decided after it wrote or drew numbers, so it can't run again."""
    if decision.late:
        raise TraceError(
            f"{type(module).__name__}.forward decides otherwise than in the calls known so far, when it has written or "
            "drawn something already",
            where=decision.where,
            why=f"{decision}; rules look into it, and it can't be run once more for a graph of this call",
        ) from decision
