"""A rule's rewrite of one site, recorded: its edits as a tape, and the tensors it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from surgery.authoring.example_values import TapeSamples
from surgery.authoring.hook_call import HookCall
from surgery.authoring.missed_structure import suggest_target
from surgery.authoring.rule import Rule
from surgery.authoring.site import Example, ParamSpec, Site
from surgery.errors import SiteError, SurgeryError
from surgery.forward.function_watch import FunctionWatch
from surgery.forward.own_forward import OwnForward
from surgery.forward.tape import Layer, Tape, for_both_modes
from surgery.forward.values import Value
from surgery.state.records import Applied, site_state

__all__ = ["PassedOver", "Recording", "layer_of", "recorded"]


class Recording(NamedTuple):
    """A rewrite as a tape, the tensors it asks for, and whether it looks into the forward, held as `own`.

    `told`: what it leaves out of its matches without having asked for it, as sentences.
    """

    tape: Tape
    specs: tuple[ParamSpec, ...]
    own: OwnForward
    inside: bool
    told: tuple[str, ...] = ()


class PassedOver(Exception):
    """A rule has nothing to do at a site, though its targets match it."""


def recorded(
    rule: Rule,
    module: nn.Module,
    path: str,
    adapter: str,
    own: OwnForward,
    example: Example = None,
    owners: tuple[nn.Module, ...] = (),
    facts: dict[str, Any] | None = None,
) -> Recording:
    """A rule's rewrite of a site; `PassedOver` for NotImplemented.

    `facts` are those found when the rule was applied; what it finds anew is put there.
    """

    def others() -> tuple[Rule, ...]:
        state = site_state(module)
        return tuple(one.rule for one in state.applied if one.adapter != adapter) if state is not None else ()

    def site() -> Site:
        return Site(module, path, adapter, rule.label, own, example, owners, facts, others)

    first, by_mode = _ran(rule, site(), module.training)
    if not by_mode or first.inside:  # what looks into a forward is recorded for each kind of call
        return _recording(first, first.tape, first.specs)
    other, _ = _ran(rule, site(), not module.training)
    tape = for_both_modes(*((other.tape, first.tape) if module.training else (first.tape, other.tape)))
    if not tape.acts:
        raise _idle(rule, first)
    return _recording(first, tape, {**other.specs, **first.specs})


def _recording(site: Site, tape: Tape, specs: Mapping[str, ParamSpec]) -> Recording:
    return Recording(tape.intern(), tuple(specs.values()), site.own, site.inside, tuple(site.describe_dropped_ops()))


def _ran(rule: Rule, site: Site, training: bool) -> tuple[Site, bool]:
    """A site whose tape has the rewrite's steps, and whether Python went by the training flag."""
    samples = site.tape.samples = TapeSamples(site.tape, site.sample, training)
    path = site.path
    try:
        with HookCall(rule, "rewrite", path), FunctionWatch(site.tape):
            output = rule.rewrite(site)
            if output is not None and output is not NotImplemented:
                if not isinstance(output, (Value, Tensor, tuple, list, dict)):
                    raise SiteError(
                        f"{rule.label}.rewrite returned {type(output).__name__}",
                        where=path,
                        fix="return the new output, or None",
                    )
                site.replace(site.output, output)
    except SiteError as error:
        raise _with_reason(error, site)  # noqa: B904  # it is the same error
    site.tape.samples = None  # the site, and with it the example
    if output is NotImplemented:
        raise PassedOver
    if not site.tape.acts and not samples.by_mode:
        raise _idle(rule, site)
    return site, samples.by_mode


def _idle(rule: Rule, site: Site) -> SiteError:
    """The error of a rewrite without an edit: what it looked for in the forward, and where that is."""
    what, fix = f"{rule.label}.rewrite changes nothing", "return the new output, or use site.replace(old, new)"
    if not site.missed:
        return SiteError(what, where=site.path, fix=fix)
    why, other = _missed(site)
    return SiteError(what, where=site.path, why=why, fix=other or "target a module whose own forward has it")


def _with_reason(error: SiteError, site: Site) -> SiteError:
    """The error of a rewrite whose own code fails, such as `site.find(…)[0]`: with the reason why nothing was found."""
    if site.missed and error.__cause__ is not None and not isinstance(error.__cause__, SurgeryError):
        why, other = _missed(site)
        error.why = f"{error.why}; {why}"
        error.fix = other or error.fix
    return error


def _missed(site: Site) -> tuple[str, str]:
    """Why what a rewrite looked for is not in the forward, and where it is, or ''."""
    structure, reason = next(iter(site.missed.items()))
    example, graph = site.example, site.own.graph
    other = suggest_target(structure, site.module, graph, *example) if example is not None and graph is not None else ""
    return f"{structure} is not in {site.base_class.__name__}.forward: {reason}", other


def layer_of(applied: Applied, module: nn.Module, path: str, own: OwnForward) -> Layer:
    """The edits of a rule that is on a site already, recorded anew where its record was copied or unpickled.

    A rule that looks into the forward is recorded for each kind of call; so without one, nothing is known of it.
    """
    if applied.layer is None and applied.inside:
        return Layer(applied.adapter, applied.rule.label, Tape(path).intern())
    if applied.layer is None:
        tape = recorded(applied.rule, module, path, applied.adapter, own, facts=applied.facts).tape
        applied.layer = Layer(applied.adapter, applied.rule.label, tape)
    return applied.layer if applied.weight == 1.0 else applied.layer._replace(weight=applied.weight)
