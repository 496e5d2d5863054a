"""Records a rule's rewrite of one site: its edits as a tape, and the tensors that it declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from surgery.authoring.declared_tensors import ParamSpec
from surgery.authoring.example_facts import Example
from surgery.authoring.example_values import TapeSamples
from surgery.authoring.hook_call import HookCall
from surgery.authoring.match_effects import ReplacedMatch
from surgery.authoring.missed_structure import suggest_target
from surgery.authoring.rule import Rule
from surgery.authoring.site import NOTHING, Site
from surgery.errors import SiteError, SurgeryError
from surgery.forward.function_watch import FunctionWatch
from surgery.forward.own_forward import OwnForward
from surgery.forward.tape import Layer, Tape, for_both_modes
from surgery.forward.values import Value
from surgery.state.records import Applied, site_state

__all__ = ["SkippedSite", "Recording", "layer_of", "record_rewrite"]


class Recording(NamedTuple):
    """The recording of a rewrite: its tape, the tensors that it declares, and the own forward that it was recorded in.

    `inside`: whether it looks into the forward. `warnings`: sentences about matches that stay, and about operations of
    a match that the rewrite drops without asking for them. `claims`: the operations that the rewrite replaces as parts
    of matches, with the rule's label. `replaced`: these matches.
    """

    tape: Tape
    specs: tuple[ParamSpec, ...]
    own: OwnForward
    inside: bool
    warnings: tuple[str, ...] = ()
    claims: Mapping[str, str] = {}
    replaced: tuple[ReplacedMatch, ...] = ()


class SkippedSite(Exception):
    """Raised if a rule's targets match a site, but its rewrite returns NotImplemented. `reasons`: what it said."""

    def __init__(self, reasons: Sequence[str] = ()):
        super().__init__(*reasons)
        self.reasons = tuple(reasons)


def record_rewrite(
    rule: Rule,
    module: nn.Module,
    path: str,
    adapter: str,
    own: OwnForward,
    example: Example = None,
    owners: tuple[nn.Module, ...] = (),
    facts: dict[str, Any] | None = None,
    claimed: Mapping[str, str] = NOTHING,
    training: bool | None = None,
) -> Recording:
    """Record a rule's rewrite of a site. Raises `SkippedSite` if the rewrite returns NotImplemented.

    `facts`: the rule's facts at the site from its first recording. New facts are added to the dict. `claimed`: the
    operations that earlier rules of the adapter replace. `training`: the mode of the graph in `own`; default: the
    module's present mode.
    """
    mode = module.training if training is None else training

    def other_rules() -> tuple[Rule, ...]:
        state = site_state(module)
        return (
            tuple(applied.rule for applied in state.applied if applied.adapter != adapter) if state is not None else ()
        )

    def site() -> Site:
        return Site(module, path, adapter, rule.label, own, example, owners, facts, other_rules, claimed)

    first, by_mode = _run_rewrite(rule, site(), mode)
    if not by_mode or first.inside:  # a rule that looks into the forward is recorded for each kind of call
        return _recording(first, first.tape, first.specs)
    other, _ = _run_rewrite(rule, site(), not mode)
    tape = for_both_modes(*((other.tape, first.tape) if mode else (first.tape, other.tape)))
    if not tape.acts:
        raise _no_edit_error(rule, first)
    return _recording(first, tape, {**other.specs, **first.specs})


def _recording(site: Site, tape: Tape, specs: Mapping[str, ParamSpec]) -> Recording:
    warnings = (*site.warnings, *site.describe_dropped_ops())
    return Recording(
        tape.intern(), tuple(specs.values()), site.own, site.inside, warnings, site.claims, tuple(site.replaced)
    )


def _run_rewrite(rule: Rule, site: Site, training: bool) -> tuple[Site, bool]:
    """Run a rewrite in one mode. Returns the site with the recorded tape, and whether Python read the mode."""
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
        raise _add_reason(error, site)  # noqa: B904  # the same error
    site.tape.samples = None  # the samples hold the site, and the site holds the example
    if output is NotImplemented:
        raise SkippedSite(site.warnings)
    if not site.tape.acts and not samples.by_mode:
        raise _no_edit_error(rule, site)
    return site, samples.by_mode


def _no_edit_error(rule: Rule, site: Site) -> SiteError:
    """Returns the error for a rewrite without an edit. It names the structure that the rewrite did not find."""
    what, fix = f"{rule.label}.rewrite changes nothing", "return the new output, or use site.replace(old, new)"
    if not site.missed:
        return SiteError(what, where=site.path, fix=fix)
    why, other = _explain_miss(site)
    return SiteError(what, where=site.path, why=why, fix=other or "target a module whose own forward has it")


def _add_reason(error: SiteError, site: Site) -> SiteError:
    """Add the reason why `site.find` found nothing to an error of the rewrite's own code, such as `site.find(…)[0]`."""
    if site.missed and error.__cause__ is not None and not isinstance(error.__cause__, SurgeryError):
        why, other = _explain_miss(site)
        error.why = f"{error.why}; {why}"
        error.fix = other or error.fix
    return error


def _explain_miss(site: Site) -> tuple[str, str]:
    """Returns why a structure is not in the forward, and a hint where it is, or ''."""
    structure, reason = next(iter(site.missed.items()))
    example, graph = site.example, site.own.graph
    other = suggest_target(structure, site.module, graph, *example) if example is not None and graph is not None else ""
    return f"{structure} is not in {site.base_class.__name__}.forward: {reason}", other


def layer_of(applied: Applied, module: nn.Module, path: str, own: OwnForward) -> Layer:
    """Returns the edits of an applied rule. They are recorded again after a copy or unpickling.

    A rule that looks into the forward is recorded for each kind of call, so without a call its tape is empty.
    """
    if applied.layer is None and applied.inside:
        return Layer(applied.adapter, applied.rule.label, Tape(path).intern())
    if applied.layer is None:
        tape = record_rewrite(applied.rule, module, path, applied.adapter, own, facts=applied.facts).tape
        applied.layer = Layer(applied.adapter, applied.rule.label, tape)
    return applied.layer if applied.weight == 1.0 else applied.layer._replace(weight=applied.weight)
