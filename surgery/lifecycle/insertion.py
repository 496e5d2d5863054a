"""Installs a plan on its model in one transaction: tensors, generated classes, records, a check of the outputs."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.arithmetic.exact_fold import Record, folded_value
from surgery.authoring.declared_tensors import ParamSpec
from surgery.authoring.hook_call import HookCall
from surgery.authoring.live_site import LiveSite
from surgery.authoring.planned_rule import PlannedRule
from surgery.errors import SurgeryWarning
from surgery.forward.offloaded_weights import device_of_calls, value_at
from surgery.forward.tape import Layer
from surgery.lifecycle.freezing import freeze_base, train_structure
from surgery.lifecycle.gradient_reducers import watch_gradients
from surgery.lifecycle.tensor_start import start
from surgery.merging.offloaded_merge import fold_offloaded
from surgery.merging.site_folding import check_foldable, fold_into
from surgery.packed.packed_map import packed_by_name
from surgery.patterns.offload_hooks import is_offloaded
from surgery.patterns.wrappers import submodule
from surgery.planning.call_readiness import prepare_sites
from surgery.planning.equivalence_check import check_equivalence
from surgery.planning.output_check import check_outputs
from surgery.planning.plan import Plan
from surgery.progress import Progress, each_step
from surgery.rewritten_model import transformers_hooks
from surgery.rewritten_model.moved_sites import watch
from surgery.rewritten_model.restructure import make_edits
from surgery.state.absent_values import watch_absent
from surgery.state.adapter_tensors import attach, box_of, tensors_of
from surgery.state.in_use import check_free
from surgery.state.kept_codes import KeptCodes, change_codes
from surgery.state.parameter_owners import Owners
from surgery.state.record_undo import keep_model, keep_site
from surgery.state.records import (
    _MODEL,
    _SITE,
    Applied,
    ModelState,
    Places,
    SiteState,
    Standing,
    model_state,
    site_state,
)
from surgery.transaction.undo_log import Journal
from surgery.weaving.site_class import ClassChange

__all__ = ["install_plan"]


# The value that a new tensor starts with; None: the rule fills it.
InitialValue = Callable[[PlannedRule, ParamSpec], Tensor | None]


def install_plan(
    plan: Plan,
    stacklevel: int = 2,
    initial: InitialValue | None = None,
    progress: Progress = False,
    fill_structure: Callable[[], None] | None = None,
) -> None:
    """Install a plan on its model, which must not have changed since planning.

    `fill_structure`: gives the tensors of structural rules other values, before rules read them.
    """
    plan.raise_problems()
    check_free(plan.model)
    for warning in plan.warnings:
        warnings.warn(warning, SurgeryWarning, stacklevel=stacklevel)
    standing, owners, tied = Standing(freezes=plan.freezes), Owners(plan.model), dict[Any, Tensor]()
    unready: list[str] = []
    with Journal() as journal:
        for record in plan.structure:
            make_edits(plan.model, model_state(plan.model), record, journal)
        if fill_structure is not None:
            fill_structure()
        with torch.no_grad(), each_step(plan.steps, progress, f"apply {plan.adapter}") as plan_steps:
            for step in plan_steps:
                _insert_tensors(step, plan, standing, owners, initial, tied, journal)
        _install_classes(plan, journal)
        _record_adapter(plan.model, plan, standing, journal)
        if plan.observations:
            if initial is None:
                check_equivalence(plan)
            check_outputs(plan)
            unready = prepare_sites(plan.steps, plan.observations, plan.warnings)
    for reason in unready:
        warnings.warn(reason, SurgeryWarning, stacklevel=stacklevel)
    boxes = plan.model.__dict__[_MODEL].places[plan.adapter].boxes
    watch_gradients(plan.adapter, (parameter for box in boxes for parameter in box.parameters()))


def _insert_tensors(
    step: PlannedRule,
    plan: Plan,
    standing: Standing,
    owners: Owners,
    initial: InitialValue | None,
    tied: dict[Any, Tensor],
    journal: Journal,
) -> None:
    """Add a rule's tensors to its site and initialise them. The site's forward does not change yet."""
    module = step.module
    keep_site(journal, module, (plan.adapter,))
    state = site_state(module)
    if state is None:
        state = module.__dict__[_SITE] = SiteState(step.path, type(module))
    applied = Applied(
        plan.adapter,
        step.rule,
        standing,
        tensors=tuple(spec.name for spec in step.specs),
        trained=tuple(spec.name for spec in step.specs if spec.trainable and not spec.buffer),
        inside=step.inside,
        layer=Layer(plan.adapter, step.rule.label, step.tape),
        facts=step.facts,
    )
    device = device_of_calls(module) or _device_of(module)
    tensors = dict[str, tuple[Tensor, bool]]()
    for spec in step.specs:
        tie = spec.tie(step.rule)
        tensor = tied[tie] if tie in tied else _create(spec, device, initial and initial(step, spec))
        tensors[spec.name] = tensor, spec.buffer
        if tie is not None:
            tied[tie] = tensor
    if tensors:
        attach(module, plan.adapter, tensors, step.path)
        if any(tensor.is_meta for tensor, _ in tensors.values()) and (box := box_of(module, plan.adapter)) is not None:
            watch_absent(module, box, start, journal)
    state.applied.append(applied)
    live = LiveSite(
        module, step.path, plan.adapter, tensors_of(module, plan.adapter), lambda name, _: value_at(module, name)
    )
    with HookCall(step.rule, "initialise", step.path):
        changes = dict(step.rule.initialise(live) or {})
    if not changes:
        return
    standing.in_base = True
    if is_offloaded(module):
        applied.changed += fold_offloaded(owners, module, changes, step.path, journal)
        return
    for name, change in changes.items():
        packed = packed_by_name(module).get(name)
        if packed is not None:
            record: Record | KeptCodes = change_codes(packed, folded_value(packed.dequantise(), change), journal)
        else:
            check_foldable(owners, module, name, change, step.path)
            record = fold_into(module, name, change, keep="record", where=step.path, journal=journal)
        applied.changed.append((name, record))


def _device_of(module: nn.Module) -> torch.device | None:
    own = (tensor for tensor in module._parameters.values() if tensor is not None)
    return next((tensor.device for tensor in itertools.chain(own, module.parameters(), module.buffers())), None)


def _create(spec: ParamSpec, device: torch.device | None, value: Tensor | None) -> Tensor:
    tensor = torch.empty(spec.shape, dtype=spec.dtype, device=device)
    if value is None:
        spec.fill(tensor)
    else:
        tensor.copy_(value)
    return tensor if spec.buffer else nn.Parameter(tensor, requires_grad=spec.trainable)


def _install_classes(plan: Plan, journal: Journal) -> None:
    """Give each site its generated class. Sites whose steps have the same rules and tapes share one class."""
    steps_at: dict[int, list[PlannedRule]] = {}
    for step in plan.steps:
        steps_at.setdefault(id(step.module), []).append(step)
    shared = ClassChange(journal)
    for steps in steps_at.values():
        shared.install(steps[0].module, tuple([(id(step.rule), id(step.tape)) for step in steps]), steps[0].own)


def _record_adapter(model: nn.Module, plan: Plan, standing: Standing, journal: Journal) -> None:
    """Record the adapter on the model, freeze the base, and note what `remove` must restore."""
    state = model_state(model)
    keep_model(journal, model, state)
    if state is None:
        state = model.__dict__[_MODEL] = ModelState()
    freeze_base(plan, state, journal)
    train_structure(plan, journal)
    state.adapters[plan.adapter] = plan.rules
    state.standing[plan.adapter] = standing
    state.structure += plan.structure
    touched = {id(step.module): step.module for step in plan.steps}.values()
    state.place(plan.adapter, Places.of(plan.adapter, [(m, _rules_at(m, plan.adapter)) for m in touched]))
    watch(model, state, journal)
    for path, (name, value) in plan.switches.items():
        reader = submodule(model, path)
        if not any(path == old for old, *_ in state.switched):
            state.switched.append((path, name, getattr(reader, name), value))
        journal.attribute(reader, name)
        setattr(reader, name, value)
    transformers_hooks.prepare(model, state, plan.adapter, journal)


def _rules_at(module: nn.Module, adapter: str) -> list[Applied]:
    site = site_state(module)
    return [applied for _, applied in site.of((adapter,))] if site is not None else []
