"""The engine's verbs: plan, apply, explain, remove. Each reads as the flow match → plan → trace → rewrite → install."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surgery import hf
from surgery.absent import watch_absent
from surgery.arguments import rule_problem
from surgery.base_rule import Rule
from surgery.claims import check_free
from surgery.errors import SiteError, SurgeryError, SurgeryWarning
from surgery.example import call, equal
from surgery.folding import check_foldable, fold_into, verify_records
from surgery.following import unwatch, watch
from surgery.freezing import freeze_base, thaw_base
from surgery.hints import HINT
from surgery.hooks import running
from surgery.install import reason_against
from surgery.journal import Journal
from surgery.kept import keep_model, keep_site, take_out_fold
from surgery.links import there
from surgery.live_site import LiveSite
from surgery.living import Shared
from surgery.match import Tree, verdict_of
from surgery.neutral import neutrally, verb
from surgery.owners import Owners
from surgery.pattern import Verdict
from surgery.plan import Plan, make_plan
from surgery.ranks import rank_warnings
from surgery.ready import sites_ready
from surgery.recording import Step
from surgery.reducers import watch_gradients
from surgery.root import rewritten, with_lost
from surgery.site import ParamSpec
from surgery.starting import start
from surgery.state import (
    _MODEL,
    _SITE,
    Applied,
    ModelState,
    Places,
    SiteState,
    Standing,
    adapter_names,
    attach,
    box_of,
    detach,
    model_state,
    site_state,
    tensors_of,
)
from surgery.tape import Layer
from surgery.view import tensor_at
from surgery.wrapped import submodule, unwrapped

__all__ = ["apply_rules", "explain", "plan_rules", "remove"]

M = TypeVar("M", bound=nn.Module)
Given = Callable[[Step, ParamSpec], Tensor | None]


@verb
def apply_rules(
    model: M,
    rules: Iterable[Rule] | Rule,
    *,
    adapter: str = "default",
    example_inputs: Any = None,
    freeze: bool | None = None,
) -> M:
    """Rewrite a model in place by rules; the same object comes back, adapted.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, remove
    >>> from rules import LoraRule
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.randn(4, 8)
    >>> before = model(x)
    >>> apply_rules(model, [LoraRule("0", rank=2)]) is model
    True
    >>> torch.equal(model(x), before), isinstance(model[0], nn.Linear)
    (True, True)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.adapters.default.A', '0.adapters.default.B']
    >>> _ = remove(model)

    Applying stacks: adapters there before stay live.

    `freeze`: whether the base's parameters stop requiring gradients, until `remove` gives their flags back. None, the
    default: where the rules bring parameters that train, as in PEFT; rules that only look (`CaptureRule`) leave the
    base as it trains. False: base and adapter train together.

    `example_inputs` (a tensor, a tuple of arguments or a dict of keyword arguments) is run once before anything is
    touched: targets that it never reaches are reported, held graphs are compared with the forwards they stand for, and
    rules that promise an unchanged output at the start are held to it. A list holds several examples, one for each kind
    of call: `[{"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}]`. What rules that look into forwards need
    is made ready for them, in evaluation and in training, with and without gradients.

    All or nothing: raises `SurgeryError` (`PlanError` where several things are wrong) with the model as it was.
    """
    plan = make_plan(model, rules, adapter, example_inputs, freeze)
    plan.warnings += rank_warnings(plan.steps)
    carry_out(plan, stacklevel=4)
    return model


@neutrally()
def plan_rules(
    model: nn.Module,
    rules: Iterable[Rule] | Rule,
    *,
    adapter: str = "default",
    example_inputs: Any = None,
    freeze: bool | None = None,
) -> Plan:
    """What `apply_rules` would do, and every reason why it would refuse; touches nothing.

    >>> from torch import nn
    >>> from surgery import plan_rules
    >>> from rules import LoraRule
    >>> print(plan_rules(nn.Sequential(nn.Linear(8, 8)), [LoraRule("0", rank=2)]))
    adapter 'default': 1 edits, 32 trainable parameters; the base is frozen
    rule      site  type    tensors          trainable
    LoraRule     0  Linear  A[2, 8] B[8, 2]         32
    """
    plan = make_plan(model, rules, adapter, example_inputs, freeze)
    plan.warnings += rank_warnings(plan.steps)
    return plan


def explain(model: nn.Module, rule: Rule, path: str) -> Verdict:
    """Why a rule does or does not match the module at `path`, clause by clause; truth is the match.

    >>> from torch import nn
    >>> from surgery import explain
    >>> from rules import LoraRule
    >>> print(explain(nn.Sequential(nn.Linear(2, 2)), LoraRule("query"), "0"))
    no   LoraRule at 0: fails at targets
         no   targets: no target matches
              no   name('query'): its path is 0

    `MatchError` with near misses where the model has no such path.
    """
    if not isinstance(rule, Rule):
        raise rule_problem(rule)
    return verdict_of(Tree.of(unwrapped(model)), rule, path)


@verb
def remove(model: M, adapter: str | Sequence[str] | None = None, *, check: bool = True) -> M:
    """Take an adapter (or several, or all) away: the inverse of `apply_rules`, exact to the bit.

    >>> from torch import nn
    >>> from surgery import apply_rules, remove
    >>> from rules import LoraRule
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> weight, kind = model[0].weight, type(model[0])
    >>> _ = remove(apply_rules(model, [LoraRule("0", rank=2)]))
    >>> model[0].weight is weight, type(model[0]) is kind, weight.requires_grad
    (True, True, True)

    With the last adapter go all traces: classes, parameters, key order and hooks are those from before the first; with
    the last one that froze the base, its `requires_grad` flags are those from before it was frozen.

    Raises `SurgeryError` for an unknown adapter, a merged model, or where a later adapter's initialisation sits on top
    of a base weight that this one changed. A base weight that PiSSA or its like changed at the start, and that was
    changed since, is found by checksum; `check=False` takes the change out all the same, and takes rules off what is
    left of a model where modules were replaced since.
    """
    root, state = rewritten(model, lost=not check)
    names = list(dict.fromkeys(adapter_names(state, adapter)))
    check_free(root)
    found = list(_sites_of(root, state, names))
    for path, module, site in found:
        _check_removable(path, module, site, names, check)
    keys = hf.keys_of(root, state, names)
    with Journal() as journal:
        shared, going = Shared(journal), frozenset(names)
        for _, module, site in found:
            _take_out(module, site, going, check, shared)
        keep_model(journal, model, state)
        for name in names:
            state.forget(name)
        thaw_base(root, state, journal)
        if not state.adapters:
            restore(root, state, journal)
        else:
            hf.unlist(root, state, keys, journal)
    return model


def carry_out(
    plan: Plan,
    stacklevel: int = 2,
    given: Given | None = None,
) -> None:
    """Do what a plan says, which was made of this model as it is now.

    `given`: what a tensor starts with, or None where it starts as its rule says.
    """
    plan.raise_problems()
    check_free(plan.model)
    for warning in plan.warnings:
        warnings.warn(warning, SurgeryWarning, stacklevel=stacklevel)
    standing, owners, tied = Standing(freezes=plan.freezes), Owners(plan.model), dict[Any, Tensor]()
    unready: list[str] = []
    with Journal() as journal:
        with torch.no_grad():
            for step in plan.steps:
                _insert(step, plan, standing, owners, given, tied, journal)
        _install(plan, journal)
        _record(plan.model, plan, standing, journal)
        if plan.observations:
            _check_outputs(plan)
            unready = sites_ready(plan.steps, plan.observations, plan.warnings)
    for told in unready:
        warnings.warn(told, SurgeryWarning, stacklevel=stacklevel)
    boxes = plan.model.__dict__[_MODEL].places[plan.adapter].boxes
    watch_gradients(plan.adapter, (parameter for box in boxes for parameter in box.parameters()))


# Applying -----------------------------------------------------------------------------------------------------


def _insert(
    step: Step,
    plan: Plan,
    standing: Standing,
    owners: Owners,
    given: Given | None,
    tied: dict[Any, Tensor],
    journal: Journal,
) -> None:
    """Put a rule's tensors on its site and let it initialise them; the forward is still the old one."""
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
    device = _device_of(module)
    made = dict[str, tuple[Tensor, bool]]()
    for spec in step.specs:
        tie = spec.tie(step.rule)
        tensor = tied[tie] if tie in tied else _made(spec, device, given and given(step, spec))
        made[spec.name] = tensor, spec.buffer
        if tie is not None:
            tied[tie] = tensor
    if made:
        attach(module, plan.adapter, made, step.path)
        if any(tensor.is_meta for tensor, _ in made.values()) and (box := box_of(module, plan.adapter)) is not None:
            watch_absent(module, box, start, journal)
    state.applied.append(applied)
    live = LiveSite(
        module, step.path, plan.adapter, tensors_of(module, plan.adapter), lambda name, _: tensor_at(module, name)
    )
    with running(step.rule, "initialise", step.path):
        changes = dict(step.rule.initialise(live) or {})
    for name, change in changes.items():
        check_foldable(owners, module, name, change, step.path)
        record = fold_into(module, name, change, keep="record", where=step.path, journal=journal)
        applied.changed.append((name, record))
        standing.in_base = True


def _device_of(module: nn.Module) -> torch.device | None:
    own = (tensor for tensor in module._parameters.values() if tensor is not None)
    return next((tensor.device for tensor in itertools.chain(own, module.parameters(), module.buffers())), None)


def _made(spec: ParamSpec, device: torch.device | None, value: Tensor | None) -> Tensor:
    tensor = torch.empty(spec.shape, dtype=spec.dtype, device=device)
    if value is None:
        spec.fill(tensor)
    else:
        tensor.copy_(value)
    return tensor if spec.buffer else nn.Parameter(tensor, requires_grad=spec.trainable)


def _install(plan: Plan, journal: Journal) -> None:
    """Give the sites their classes. What one plan brings to sites is the same where its tapes are the same objects."""
    coming: dict[int, list[Step]] = {}
    for step in plan.steps:
        coming.setdefault(id(step.module), []).append(step)
    shared = Shared(journal)
    for steps in coming.values():
        shared.install(steps[0].module, tuple([(id(step.rule), id(step.tape)) for step in steps]), steps[0].own)


def _record(model: nn.Module, plan: Plan, standing: Standing, journal: Journal) -> None:
    """Freeze the base and write down, on the model, what has to be put back when adapters go."""
    state = model_state(model)
    keep_model(journal, model, state)
    if state is None:
        state = model.__dict__[_MODEL] = ModelState()
    freeze_base(plan, state, journal)
    state.adapters[plan.adapter] = plan.rules
    state.standing[plan.adapter] = standing
    touched = {id(step.module): step.module for step in plan.steps}.values()
    state.place(plan.adapter, Places.of(plan.adapter, [(m, _rules_at(m, plan.adapter)) for m in touched]))
    watch(model, state, journal)
    for path, (name, value) in plan.switches.items():
        reader = submodule(model, path)
        if not any(path == old for old, *_ in state.switched):
            state.switched.append((path, name, getattr(reader, name), value))
        journal.attribute(reader, name)
        setattr(reader, name, value)
    hf.prepare(model, state, plan.adapter, journal)


def _rules_at(module: nn.Module, adapter: str) -> list[Applied]:
    held = site_state(module)
    return [applied for _, applied in held.of((adapter,))] if held is not None else []


def _check_outputs(plan: Plan) -> None:
    """Run the rewritten model on the examples: it must run, and give the same where all rules promise so."""
    names = ", ".join(dict.fromkeys(step.rule.label for step in plan.steps))
    for example, observation in zip(plan.examples, plan.observations, strict=True):
        try:
            output = call(plan.model, example, observation.random)
        except SurgeryError as error:
            notes = getattr(error.__cause__ or error, "__notes__", [])
            own = error.__cause__ is None  # raised inside of the forward, and not by the call
            raise SurgeryError(
                f"the model rewritten by {names} fails on the example call",
                where=notes[0] if notes else None,
                why=": ".join(filter(None, (error.what, error.why))) if own else error.why,
                fix=next((note for note in notes if note.startswith(HINT)), "").removeprefix(HINT)
                or "correct the rule's rewrite; `show` prints a site's generated code",
            ) from error
        if all(step.rule.identity for step in plan.steps) and not equal(output, observation.output):
            raise SurgeryError(
                f"{names} changed the model's output at initialisation",
                why="the rule says identity = True, and on the example call the output differs",
                fix="correct the rule's initial values, or take identity = True from it",
            )


# Removing -----------------------------------------------------------------------------------------------------


def _sites_of(model: nn.Module, state: ModelState, names: Sequence[str]) -> Iterator[tuple[str, nn.Module, SiteState]]:
    """The sites that these adapters are on. Of a site that is none by the record, all rules are gone through."""
    placed = {id(module) for name in names for module in state.places[name].modules}
    for path, module, site in with_lost(model, state, names):
        if id(module) in placed or any(applied.adapter in names for applied in site.applied):
            yield path, module, site


def _check_removable(path: str, module: nn.Module, site: SiteState, names: list[str], check: bool) -> None:
    if site.merged is not None:
        held = ", ".join(site.merged.adapters)
        raise SiteError("the model is merged", where=path, why=f"its weights hold {held}", fix="unmerge(model) first")
    refused = reason_against(module)
    if refused is not None:
        raise SiteError("the site can't be given its class back", where=path, why=refused[0], fix=refused[1])
    gone = [applied for _, applied in site.of(names)]
    if not any([applied.changed for applied in gone]):
        return
    staying, left = set[str](), len(gone)
    for applied in reversed(site.applied):
        if not left:
            break
        left -= applied.adapter in names
        changed = {name for name, _ in applied.changed}
        if applied.adapter in names and changed & staying:
            above = [a for a in site.applied if a.adapter not in names and changed & {name for name, _ in a.changed}]
            raise SiteError(
                f"the adapter {applied.adapter!r} can't be removed yet",
                where=path,
                why=f"{above[-1].rule.label} [{above[-1].adapter}] changed {', '.join(changed & staying)} after it",
                fix=f"remove {above[-1].adapter!r} first",
            )
        if applied.adapter not in names:
            staying |= changed
    verify_records([(tensor_at(module, name), record) for a in gone for name, record in a.changed], path, check)


def _take_out(module: nn.Module, site: SiteState, names: frozenset[str], check: bool, shared: Shared) -> None:
    keep_site(shared.journal, module)
    gone = [applied for _, applied in site.take_out(names)]
    if any([applied.live for applied in gone]):
        shared.install(module, names)
    else:
        site.classes.clear()  # another adapter may come under the same name
    for applied in reversed(gone):
        for name, record in reversed(applied.changed):
            take_out_fold(shared.journal, tensor_at(module, name), record, check=check, where=site.path)
    for name in {applied.adapter for applied in gone}:
        detach(module, name)
    if not site.applied:
        del module.__dict__[_SITE]


def restore(model: nn.Module, state: ModelState, journal: Journal) -> None:
    """After the last adapter went: what was noted when the first came, and no record."""
    for path, name, value, _ in state.switched:
        if (reader := there(model, path)) is not None:
            journal.attribute(reader, name)
            setattr(reader, name, value)
    hf.restore(model, state, journal)
    unwatch(model, journal)
    del model.__dict__[_MODEL]
