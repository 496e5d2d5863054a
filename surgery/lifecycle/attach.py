"""Adds an adapter whose sites and tensors are known, without matching targets or drawing initial values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from surgery.authoring.planned_rule import PlannedRule
from surgery.authoring.rule import Rule
from surgery.errors import PlanError, SiteError, SurgeryError
from surgery.forward.own_forward import own_forward
from surgery.forward.tape import Layer
from surgery.rewritten_model import transformers_hooks
from surgery.state.adapter_tensors import attach, attach_again, box_of
from surgery.state.record_undo import keep_model, keep_site
from surgery.state.records import Applied, Places, SiteState, Standing, require_state, site_state
from surgery.transaction.undo_log import Journal
from surgery.weaving.class_objections import reason_against
from surgery.weaving.conflicts import find_conflicts
from surgery.weaving.rewrite_recording import SkippedSite, record_rewrite

__all__ = ["PlacedRule", "attach_idle"]


@dataclass
class PlacedRule:
    """One rule at one site, with its tensors: name → (tensor, whether it is a buffer).

    `flags`: the tensors' `requires_grad` while the adapter is live, if it differs from what the rule says.
    `trained`: the names of the tensors that train; empty: those that the rule trains.
    """

    module: nn.Module
    rule: Rule
    tensors: Mapping[str, tuple[Tensor, bool]]
    facts: dict[str, Any] = field(default_factory=dict)
    inside: bool = False
    flags: Mapping[str, bool] = field(default_factory=dict)
    trained: tuple[str, ...] = ()


def attach_idle(
    model: nn.Module, adapter: str, rules: Sequence[Rule], placed: Iterable[PlacedRule], sources: Iterable[str]
) -> None:
    """Add an idle adapter of these rules, so the model's outputs do not change. All or nothing.

    The adapter freezes the base if one of its `sources` does: the adapters that it is made from. Each rule's rewrite is
    recorded at its site from the known facts, and the shapes of the tensors must be those that the rewrite asks for.
    """
    state, sources = require_state(model), list(sources)
    standing = Standing(live=False, freezes=any(state.standing[name].freezes for name in sources))
    with Journal() as journal:
        steps, places, tied = list[PlannedRule](), dict[int, tuple[nn.Module, list[Applied]]](), dict[Any, Tensor]()
        for placement in placed:
            site = site_state(placement.module)
            assert site is not None
            if (refused := reason_against(placement.module)) is not None:
                what = "the site can't have another adapter"
                raise SurgeryError(what, where=site.path, why=refused[0], fix=refused[1])
            steps += _attach_rule(placement, adapter, standing, site, tied, journal)
            places.setdefault(id(placement.module), (placement.module, []))[1].append(site.applied[-1])
        if problems := find_conflicts(steps, with_live=False):
            raise PlanError(problems)
        keep_model(journal, model, state)
        state.adapters[adapter] = tuple(rules)
        state.place(adapter, Places.of(adapter, places.values()))
        state.standing[adapter] = standing
        state.peft_fields[adapter] = _common_fields([state.peft_fields.get(name, {}) for name in sources])
        transformers_hooks.list_on_save(model, state, adapter, journal)


def _common_fields(all_fields: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fields of PEFT's configuration, such as the task, on which the adapters that have them agree."""
    together = {name: value for fields in all_fields for name, value in fields.items()}
    return {
        name: value
        for name, value in together.items()
        if all(fields.get(name, value) == value for fields in all_fields)
    }


def _attach_rule(
    placement: PlacedRule, adapter: str, standing: Standing, site: SiteState, tied: dict[Any, Tensor], journal: Journal
) -> list[PlannedRule]:
    """Put one rule with its tensors on a site, idle; return its recording as a step, to check for conflicts."""
    module, path = placement.module, site.path
    keep_site(journal, module, (adapter,))
    if placement.tensors:
        attach(module, adapter, placement.tensors, path)
    applied = Applied(
        adapter,
        placement.rule,
        standing,
        tensors=tuple(placement.tensors),
        inside=placement.inside,
        facts=placement.facts,
    )
    trained = {name: tensor.requires_grad for name, (tensor, buffer) in placement.tensors.items() if not buffer}
    steps = []
    if not placement.inside:  # a rule that looks into the forward is recorded for each kind of call
        own = own_forward(module, site.base)
        try:
            recording = record_rewrite(placement.rule, module, path, adapter, own, facts=placement.facts)
        except SkippedSite:
            raise SiteError(f"{placement.rule.label} finds nothing to do here", where=path) from None
        expected = {spec.name: spec.shape for spec in recording.specs}
        shapes = {name: tuple(tensor.shape) for name, (tensor, _) in placement.tensors.items()}
        if expected != shapes:
            raise SurgeryError(f"{placement.rule.label} asks for {expected}, and is given {shapes}", where=path)
        for spec in recording.specs:
            if (tie := spec.tie(placement.rule)) is not None:
                attach_again(module, adapter, spec.name, tied.setdefault(tie, placement.tensors[spec.name][0]))
        applied.layer = Layer(adapter, placement.rule.label, recording.tape)
        trained = {spec.name: spec.trainable for spec in recording.specs if not spec.buffer}
        steps.append(
            PlannedRule(
                placement.rule, path, module, (), recording.own, recording.tape, recording.specs, False, placement.facts
            )
        )
    applied.trained = placement.trained or tuple(name for name, flag in trained.items() if flag)
    box = box_of(module, adapter)
    if box is not None:
        box.still |= {name for name, flag in trained.items() if not placement.flags.get(name, flag)}
    for tensor, buffer in placement.tensors.values():
        if not buffer:
            tensor.requires_grad_(False)
    site.applied.append(applied)
    return steps
