"""Makes a plan from rules and a model, without changing the model.

For each rule: match its targets (`_match`), then at each target trace the module's forward and record the rule's
rewrite (`_plan_site`). Example calls check the result (`check_examples`). The plan collects all problems.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from surgery.authoring.hook_call import HookCall
from surgery.authoring.planned_rule import PlannedRule
from surgery.authoring.rule import Rule
from surgery.authoring.rule_arguments import model_problem, rules_in
from surgery.authoring.site_facts import INLINED
from surgery.authoring.structure_rule import StructureRule
from surgery.errors import MatchError, RuleError, SiteError, SurgeryError, TraceError, abbreviate, collapse_similar
from surgery.forward.own_forward import own_forward
from surgery.packed.packed_parameters import packed_in, way_without_packing
from surgery.packed.packed_stack import attributes_of_sites
from surgery.packed.packed_weight import packed_weight_of
from surgery.patterns.wrappers import unwrap
from surgery.planning.absorbed_modules import absorbed_problems
from surgery.planning.bypassed_sites import DirectReads, check_bypasses, fast_paths, switch_fast_paths
from surgery.planning.covered_sites import uncovered
from surgery.planning.direct_reads import bypasses
from surgery.planning.equivalent_sites import site_key
from surgery.planning.matching import Match, Tree
from surgery.planning.model_check import model_problems
from surgery.planning.plan import Plan
from surgery.planning.plan_examples import check_examples
from surgery.planning.rewrite_placement import join_sites
from surgery.planning.site_matches import match_sites, nothing_to_do
from surgery.planning.structure_plan import plan_structure
from surgery.planning.unreached_sites import unreached_sites
from surgery.state.records import site_state
from surgery.state.running_statistics import changing_buffers, moving_modules
from surgery.tracing.example_call import examples_in
from surgery.transaction.undo_log import Trial
from surgery.weaving.class_objections import reason_against
from surgery.weaving.conflicts import find_conflicts
from surgery.weaving.rewrite_recording import Recording, SkippedSite, record_rewrite

__all__ = ["make_plan", "with_companions"]


def make_plan(
    model: nn.Module,
    rules: Iterable[Rule] | Rule,
    adapter: str,
    example_inputs: Any = None,
    freeze: bool | None = None,
) -> Plan:
    """Plan rules on a model: match the targets, trace the forwards, record the rewrites, check all of it.

    Planning does not change the model and does not raise: the plan collects every problem.
    """
    model = unwrap(model)
    valid_rules, problems = rules_in(rules)
    if freeze not in (True, False, None):
        problems.append(SurgeryError(f"freeze={freeze!r} is not True, False or None"))
    plan = Plan(model, adapter, valid_rules, examples=examples_in(example_inputs), freeze=freeze)
    if (problem := model_problem(model)) is not None:
        plan.problems.append(problem)
    else:
        plan.problems += problems + model_problems(model, adapter, plan.examples)
    if plan.problems:
        return plan
    structural = [rule for rule in valid_rules if isinstance(rule, StructureRule)]
    others = [rule for rule in valid_rules if not isinstance(rule, StructureRule)]
    with Trial() if structural else nullcontext():
        plan_structure(plan, structural)
        if not plan.problems:
            _plan_sites(plan, others)
    return plan


def _plan_sites(plan: Plan, rules: Sequence[Rule]) -> None:
    """Plan the rules that edit forwards."""
    model = plan.model
    tree = Tree.of(model)
    reads = DirectReads(bypasses(model), fast_paths(tree))
    matched = [
        (rule, targets, is_companion)
        for rule, is_companion in with_companions(rules)
        if (targets := match_sites(plan, tree, rule, is_companion)) is not None
    ]
    matched = _joined(tree, matched)
    own_sites = uncovered([(rule, targets) for rule, targets, _ in matched])
    for (rule, targets, is_companion), kept in zip(matched, own_sites, strict=True):
        if targets and not kept and not is_companion:
            plan.problems.append(_covered(rule, [match.path for match in targets]))
        else:
            _plan_rule(plan, rule, kept, reads, is_companion)
    plan.problems += absorbed_problems(model, plan.steps)
    plan.problems += find_conflicts(plan.steps, excludable=_excludable(tree, rules), adapter=plan.adapter)
    if plan.freezes or plan.frozen_by:
        plan.statistics += _moving_statistics(plan)
    plan.warnings = [*collapse_similar(plan.warnings), *unreached_sites(plan)]
    if plan.examples and not plan.problems:
        check_examples(plan)


def _joined(tree: Tree, matched: list[_Matched]) -> list[_Matched]:
    """Join the sites of rules that are placed by their structures."""
    placed = [index for index, (rule, _, _) in enumerate(matched) if type(rule).structures is not Rule.structures]
    for index, sites in zip(placed, join_sites(tree, [matched[index][1] for index in placed]), strict=True):
        rule, _, is_companion = matched[index]
        matched[index] = rule, sites, is_companion
    return matched


_Matched = tuple[Rule, list[Match], bool]  # a rule, its sites, and whether it is a companion


def with_companions(rules: Iterable[Rule]) -> Iterable[tuple[Rule, bool]]:
    """Each rule followed by its companions, and whether it is a companion, whose targets may match nothing."""
    for rule in rules:
        yield rule, False
        for companion in rule.companions():
            yield companion, True


def _covered(rule: Rule, paths: Sequence[str]) -> MatchError:
    return MatchError(
        f"{rule.label} finds nothing to do in what it matches",
        where=abbreviate(paths),
        why="other rules of the adapter train all that it would train",
        fix=f"leave this {rule.label} out",
    )


def _excludable(tree: Tree, rules: Sequence[Rule]) -> Callable[[Rule, str], bool]:
    """Whether a rule's field `exclude` can leave out the site at a path: its targets match the path itself."""
    own = {id(rule) for rule in rules}
    return lambda rule, path: id(rule) in own and path in tree.hits(rule.targets)


# Trace and rewrite --------------------------------------------------------------------------------------------


def _plan_rule(plan: Plan, rule: Rule, targets: Sequence[Match], reads: DirectReads, is_companion: bool) -> None:
    """Plan a rule at each of its target modules."""
    for why in rule.review([match.path for match in targets]):
        plan.problems.append(why if isinstance(why, SurgeryError) else RuleError(f"{rule.label}: {why}"))
    recordings: dict[Hashable, Recording] = {}
    for match in targets:
        _plan_site(plan, rule, match, reads, is_companion, recordings)
    if blocked := [match.path for match in targets if _stops_gradients(match.module)]:
        plan.warnings.append(
            f"{rule.label}: no gradient passes through the kernels of {abbreviate(blocked)}: "
            "what comes before them trains by the adapters' own branches alone"
        )
    if targets and not is_companion and len(plan.passed) == len(targets):
        plan.problems.append(nothing_to_do(rule, plan.passed, plan.reasons))
    else:
        plan.warnings += plan.reasons
    plan.passed.clear()
    plan.reasons.clear()


def _plan_site(
    plan: Plan,
    rule: Rule,
    match: Match,
    reads: DirectReads,
    is_companion: bool,
    recordings: dict[Hashable, Recording],
) -> None:
    """Plan a rule at one module: trace the module's forward, record the rule's rewrite of it, and add the step.

    `recordings`: the rule's recordings so far, by `site_key`. Sites with equal keys share one recording.
    """
    path, module = match.path, match.module
    by_structures = type(rule).structures is not Rule.structures
    if (problem := _class_problem(rule, match, adds_tensors=not by_structures)) is not None:
        return _refuse_site(plan, rule, match, problem)
    state = site_state(module)
    base = state.base if state else type(module)
    try:
        key = site_key(rule, module, path, base)
        recording = recordings.get(key) if key is not None else None
        if recording is None and (why := _objection(rule, module, path)):
            fix = way_without_packing(module) if packed_in(module) and "packed" in why else None
            raise SiteError(f"{rule.label} can't go on this {type(module).__name__}", where=path, why=why, fix=fix)
    except SurgeryError as error:
        return _refuse_site(plan, rule, match, error)
    # The modules around a site of such a class call its forward, other than while it has no rules.
    bypasses_here = [] if attributes_of_sites(base) else reads.of(match)
    if bypasses_here and not check_bypasses(plan, rule, match, bypasses_here, is_companion or rule.skips_sites):
        plan.passed += [path] if rule.skips_sites else []
        return
    switch_fast_paths(plan, path, reads.fast_paths)
    facts: dict[str, Any] = dict(match.facts)
    try:
        if recording is None:
            own = own_forward(module, base)
            owners, claims = plan.owners_of(path), plan.claims.get(id(module), {})
            example = None if not plan.examples else lambda: plan.example_of(module)
            recording = record_rewrite(rule, module, path, plan.adapter, own, example, owners, facts, claims)
            if key is not None and not recording.inside and not facts:
                recordings[key] = recording
    except TraceError as error:
        return _refuse_site(plan, rule, match, error)
    except SurgeryError as error:
        plan.problems.append(error)
        return
    except SkippedSite as skipped:
        plan.passed.append(path)
        plan.reasons += skipped.reasons
        return
    if recording.specs and (problem := _class_problem(rule, match, adds_tensors=True)) is not None:
        plan.problems.append(problem)
        return
    plan.warnings += recording.warnings
    plan.claims.setdefault(id(module), {}).update(recording.claims)
    plan.steps.append(
        PlannedRule(
            rule,
            path,
            module,
            match.aliases,
            recording.own,
            recording.tape,
            recording.specs,
            recording.inside,
            facts,
            recording.replaced,
        )
    )


def _refuse_site(plan: Plan, rule: Rule, match: Match, error: SurgeryError) -> None:
    """Note that a rule can't rewrite a module: as a problem, or as a reason of a rule that skips such modules."""
    if not rule.skips_sites:
        plan.problems.append(error)
        return
    inlined = match.facts.get(INLINED, ())
    inside = f" with the operations of {abbreviate(list(inlined))} in it" if inlined else ""
    reason = "; ".join(filter(None, (error.what, error.why, error.where if error.where != match.path else None)))
    plan.passed.append(match.path)
    plan.reasons.append(f"{rule.label} leaves out {match.path or 'the model itself'}{inside}: {reason}")


def _class_problem(rule: Rule, match: Match, adds_tensors: bool) -> SiteError | None:
    """The problem if the class of a module can't be changed for a rule."""
    refused = reason_against(match.module, adds_tensors)
    if refused is None:
        return None
    what = f"{rule.label} can't rewrite this {type(match.module).__name__}"
    return SiteError(what, where=match.path, why=refused[0], fix=refused[1])


def _stops_gradients(module: nn.Module) -> bool:
    packed = packed_weight_of(module)
    return packed is not None and not packed.passes_gradient


def _objection(rule: Rule, module: nn.Module, path: str) -> str | None:
    with HookCall(rule, "check", path):
        return rule.check(module, path)


# Checks -------------------------------------------------------------------------------------------------------


def _moving_statistics(plan: Plan) -> list[str]:
    """The modules with buffers that training changes (running statistics), except buffers that the rules replace."""
    replaced = {(id(step.module), str(ref.key)) for step in plan.steps for ref in step.tape.replaced_refs()}
    modules = moving_modules(plan.model)
    return [
        path for path, module in modules if any((id(module), name) not in replaced for name in changing_buffers(module))
    ]
