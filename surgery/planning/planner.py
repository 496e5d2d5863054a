"""Rules and a model → a plan: every match, check and rewrite, with all that is wrong, before anything is touched."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from torch import nn

from surgery.authoring.hook_call import HookCall
from surgery.authoring.rule import Rule
from surgery.authoring.rule_arguments import model_problem, rules_in
from surgery.errors import MatchError, RuleError, SiteError, SurgeryError, abbreviate, collapse_similar
from surgery.forward.own_forward import own_forward
from surgery.forward.packed_weights import UNPACKED, packed_in
from surgery.forward.tape import NOTHING, Layer
from surgery.model_record.verb_root import records_in, rewritten
from surgery.patterns.wrappers import submodule, unwrap
from surgery.planning.call_readiness import Readiness, graphs_ready
from surgery.planning.direct_reads import Bypass, bypasses, fastpath_switch
from surgery.planning.equivalent_sites import likeness
from surgery.planning.example_check import verify_graph, written_twice
from surgery.planning.matching import Match, Tree, idle_targets, matches
from surgery.planning.plan import Plan
from surgery.planning.uncalled_modules import never_called
from surgery.state.records import model_state, name_problem, site_state, sites
from surgery.state.running_statistics import moving, moving_modules
from surgery.tracing.example_call import examples_in, observe
from surgery.transaction.gradient_flags import lazy_in
from surgery.weaving.conflicts import clashes
from surgery.weaving.generated_class import reason_against
from surgery.weaving.recording import PassedOver, PlannedRule, Recording, recorded

__all__ = ["make_plan", "with_companions"]


def make_plan(
    model: nn.Module,
    rules: Iterable[Rule] | Rule,
    adapter: str,
    example_inputs: Any = None,
    freeze: bool | None = None,
) -> Plan:
    model = unwrap(model)
    listed, problems = rules_in(rules)
    if freeze not in (True, False, None):
        problems.append(SurgeryError(f"freeze={freeze!r} is not True, False or None"))
    plan = Plan(model, adapter, listed, examples=examples_in(example_inputs), freeze=freeze)
    plan.problems += (
        [problem] if (problem := model_problem(model)) else problems + _objections(model, adapter, plan.examples)
    )
    if plan.problems:
        return plan
    tree, read_past = Tree.of(model), bypasses(model)
    fast = {path: switch for path, module in tree.modules.items() if (switch := _switch(module)) is not None}
    for rule, may_miss in with_companions(listed):
        try:
            found = matches(tree, rule)
            plan.warnings += [] if may_miss else idle_targets(tree, rule)
        except MatchError as error:
            if not may_miss:
                plan.problems.append(error)
            continue
        seen: dict[int, Match] = {}
        for match in found:
            try:
                inner = _inner(rule, match)
            except SurgeryError as error:
                plan.problems.append(error)
                continue
            for path, module in inner:
                seen.setdefault(id(module), Match(path, module, tuple(p for p in tree.paths[id(module)] if p != path)))
        if not seen and not may_miss:
            listed = ", ".join(match.path for match in found[:3])
            plan.problems.append(MatchError(f"{rule.label} finds nothing to do in what it matches", where=listed))
        plan.problems += [RuleError(f"{rule.label}: {why}") for why in rule.review([m.path for m in seen.values()])]
        made: dict[Hashable, Recording] = {}
        for match in seen.values():
            past = [bypass for path in (match.path, *match.aliases) for bypass in read_past.get(path, ())]
            _add_step(plan, rule, match, past, may_miss, fast, made)
        if seen and not may_miss and len(plan.passed) == len(seen):
            listed = ", ".join(plan.passed[:3])
            plan.problems.append(MatchError(f"{rule.label} finds nothing to do in what it matches", where=listed))
        plan.passed.clear()
    plan.problems += clashes(plan.steps)
    plan.statistics += _moved(plan) if plan.freezes or plan.frozen_by else []
    plan.warnings = collapse_similar(plan.warnings)
    if plan.examples and not plan.problems:
        _check_examples(plan)
    return plan


def _moved(plan: Plan) -> list[str]:
    """The modules with buffers that training moves, but for those that these rules put others in the place of."""
    replaced = {(id(step.module), str(ref.key)) for step in plan.steps for ref in step.tape.replaced()}
    modules = moving_modules(plan.model)
    return [path for path, module in modules if any((id(module), name) not in replaced for name in moving(module))]


def with_companions(rules: Iterable[Rule]) -> Iterable[tuple[Rule, bool]]:
    for rule in rules:
        yield rule, False
        for companion in rule.companions():
            yield companion, True


def _inner(rule: Rule, match: Match) -> list[tuple[str, nn.Module]]:
    if type(rule).expand is Rule.expand:
        return [(match.path, match.module)]
    with HookCall(rule, "expand", match.path):
        return list(rule.expand(match.module, match.path))


def _add_step(
    plan: Plan,
    rule: Rule,
    match: Match,
    read_past: list[Bypass],
    may_miss: bool,
    fast: dict[str, tuple[str, Any]],
    known: dict[Hashable, Recording],
) -> None:
    """Plan one rule at one site. `known`: what it records, by what sites have in common for which it is the same."""
    path, module = match.path, match.module
    refused = reason_against(module)
    if refused is not None:
        problem = SiteError(
            f"{rule.label} can't rewrite this {type(module).__name__}", where=path, why=refused[0], fix=refused[1]
        )
        plan.problems.append(problem)
        return
    state = site_state(module)
    base = state.base if state else type(module)
    try:
        like = likeness(rule, module, path, base)
        made = known.get(like) if like is not None else None
        if made is None and (why := _objection(rule, module, path)):
            fix = UNPACKED if packed_in(module) and "packed" in why else None
            raise SiteError(f"{rule.label} can't go on this {type(module).__name__}", where=path, why=why, fix=fix)
    except SurgeryError as error:
        plan.problems.append(error)
        return
    if read_past and not _read_around(plan, rule, match, read_past, may_miss):
        return
    if fast:
        _switch_fast_paths(plan, path, fast)
    facts: dict[str, Any] = {}
    try:
        if made is None:
            own = own_forward(module, base)
            owners = plan.owners_of(path)
            example = None if not plan.examples else lambda: plan.example_of(module)
            made = recorded(rule, module, path, plan.adapter, own, example, owners, facts)
            if like is not None and not made.inside and not facts:
                known[like] = made
    except SurgeryError as error:
        plan.problems.append(error)
        return
    except PassedOver:
        plan.passed.append(path)
        return
    plan.warnings += made.told
    plan.steps.append(
        PlannedRule(rule, path, module, match.aliases, made.own, made.tape, made.specs, made.inside, facts)
    )


def _objection(rule: Rule, module: nn.Module, path: str) -> str | None:
    with HookCall(rule, "check", path):
        return rule.check(module, path)


def _read_around(plan: Plan, rule: Rule, match: Match, read_past: list[Bypass], may_miss: bool) -> bool:
    """Deal with code that reads a site's parameters past its forward; whether the rule can go there all the same.

    `may_miss`: the rule came with another, and leaves out what it would do nothing at.
    """
    path = match.path
    for bypass in read_past:
        if bypass.in_fast_path and fastpath_switch(submodule(plan.model, bypass.reader)):
            continue  # that code is switched off
        place = f"{bypass.reader_type} reads its {bypass.parameter} directly, at {bypass.file}:{bypass.line}"
        uncalled = bypass.conditional and never_called(plan.model, (path, *match.aliases))
        if bypass.conditional and not uncalled:
            plan.warnings.append(f"{rule.label} at {path} is bypassed on one branch: {place}: {bypass.source}")
            continue
        if may_miss:
            if not any(place in warning for warning in plan.warnings):
                plan.warnings.append(f"{rule.label} leaves out {path} and modules like it: {place}: {bypass.source}")
            return False
        plan.problems.append(
            SiteError(
                f"{rule.label} would be bypassed",
                where=path,
                why=f"{place}: {bypass.source}{'; no code calls the module' if uncalled else ''}",
                fix=f"target {bypass.reader or 'the model itself'!r}, exclude this module, or call it in that forward",
            )
        )
        return False
    return True


def _switch_fast_paths(plan: Plan, path: str, fast: dict[str, tuple[str, Any]]) -> None:
    """torch's encoders have inference fast paths that leave out the forwards of what they hold."""
    while path:
        path = path.rpartition(".")[0]
        if path in fast:
            plan.switches[path] = fast[path]


def _switch(module: nn.Module) -> tuple[str, Any] | None:
    switch = fastpath_switch(module)
    return switch if switch is not None and getattr(module, switch[0]) != switch[1] else None


def _pefts(model: nn.Module) -> list[SurgeryError]:
    """PEFT's own layers in a model: put there by transformers' `load_adapter` or `add_adapter`, or by PEFT itself."""
    wrapped = any(cls.__module__.startswith("peft.") for cls in type(model).__mro__)
    if not wrapped and not model.__dict__.get("_hf_peft_config_loaded"):
        return []
    return [
        SurgeryError(
            "this is PEFT's PeftModel" if wrapped else "this model holds adapters of PEFT's",
            why="PEFT put layers of its own in the place of the model's" if wrapped else "transformers put them there",
            fix="load the model anew, and PEFT's checkpoint on it by surgery.load_adapter(model, folder)",
        )
    ]


def _objections(model: nn.Module, adapter: str, examples: Sequence[Any]) -> list[SurgeryError]:
    """What is wrong with the model and the adapter's name, before any module is looked at."""
    found: list[SurgeryError] = _pefts(model)
    if examples and (lazy := lazy_in(model)):
        found.append(
            SurgeryError(
                "the example call would give the model parameters",
                where=abbreviate(lazy),
                why="they have no shape before the first call, and planning touches nothing",
                fix="run one batch through the model first: model(batch)",
            )
        )
    state, inner = model_state(model), records_in(model, below=True)
    found += [problem] if (problem := name_problem(state, adapter)) else []
    if inner:
        found.append(
            SurgeryError(
                "part of this model has rules of its own",
                where=abbreviate(inner, "parts"),
                why="each model keeps one record of its rules",
                fix="apply to the same module as before, or remove those first",
            )
        )
    elif state is not None or any(True for _ in sites(model)):
        try:
            rewritten(model)
        except SurgeryError as error:
            found.append(error)
    for path, _, site in sites(model):
        if site.merged is not None:
            why = f"its weights hold {', '.join(site.merged.adapters)}"
            found.append(SurgeryError("the model is merged", where=path, why=why, fix="unmerge(model) first"))
            break
    return found


def _check_examples(plan: Plan) -> None:
    for index, example in enumerate(plan.examples, 1):
        try:
            plan.observations.append(
                observe(plan.model, example, {id(s.module): s.module for s in plan.steps}.values())
            )
        except SurgeryError as error:
            if len(plan.examples) > 1:
                error.where = error.where or f"example {index} of {len(plan.examples)}"
            plan.problems.append(error)
            return
    verified: set[tuple] = set()
    for step in plan.steps:
        call = next((seen.calls[id(step.module)] for seen in plan.observations if seen.reached(step.module)), None)
        if call is None:
            plan.problems.append(
                MatchError(
                    f"the example call never reaches a target of {step.rule.label}",
                    where=step.path,
                    why="the model does not call this module, or reads its parameters past it",
                    fix="exclude it, or pass an example that uses it",
                )
            )
        elif (problem := _written_twice(step, plan, call)) is not None:
            plan.problems.append(problem)
        elif not step.own.opaque and step.own.key not in verified and site_state(step.module) is None:
            verified.add(step.own.key)
            try:
                verify_graph(step.module, step.own, call, step.path)
            except SurgeryError as error:
                plan.problems.append(error)
    if not plan.problems:
        plan.kinds += graphs_ready(plan.steps, plan.observations)
        plan.warnings += _unready(plan.kinds)


def _unready(kinds: Sequence[Readiness]) -> list[str]:
    """What is to be told of calls that have no graph."""
    by: dict[tuple[str, str], list[str]] = {}
    for one in kinds:
        if one.reason:
            by.setdefault((one.type, one.reason), []).append(one.kind)
    return [
        f"rules look into {name}.forward, which can't be held as a graph in calls in {'; '.join(told)}: {reason}"
        for (name, reason), told in by.items()
    ]


def _written_twice(step: PlannedRule, plan: Plan, call: tuple[tuple, dict, Any]) -> SurgeryError | None:
    """The objection to a rule that runs the module's forward more than once, where the example shows that it writes."""
    if not step.own.opaque or not any(one.kind == "own" and one.kwargs == NOTHING for one in step.tape.steps):
        return None
    layer = Layer(plan.adapter, step.rule.label, step.tape)
    return written_twice(step.module, step.own, layer, call, step.path)
