"""Plans structural rules: makes their edits on the model, inside a trial that undoes them when the plan is complete."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.authoring.hook_call import HookCall
from surgery.authoring.structure_rule import StructureRule
from surgery.errors import SiteError, SurgeryError
from surgery.model_edits.model_edits import ModelEdits
from surgery.model_edits.weight_ties import broken_ties, declare_broken
from surgery.planning.matching import Match, Tree
from surgery.planning.plan import Plan
from surgery.planning.site_matches import match_sites
from surgery.rewritten_model.resized_embeddings import check_resizable
from surgery.rewritten_model.restructure import moved_along
from surgery.rewritten_model.structure_objections import check_exchanged
from surgery.state.records import model_state
from surgery.state.restructuring import Restructuring
from surgery.transaction.undo_log import Journal

__all__ = ["plan_structure"]


def plan_structure(plan: Plan, rules: Sequence[StructureRule]) -> None:
    """Make the edits of structural rules in turn, each on the structure that those before it leave."""
    for rule in rules:
        searched = bool(rule.targets) or not rule.finds_targets
        matched = match_sites(plan, Tree.of(plan.model), rule, False) if searched else []
        if plan.problems or matched is None:
            return
        for match in matched:
            with HookCall(rule, "check", match.path):
                why = rule.check(match.module, match.path)
            if why is not None:
                kind = type(match.module).__name__
                plan.problems.append(SiteError(f"{rule.label} can't go on this {kind}", where=match.path, why=why))
        if plan.problems:
            return
        try:
            with Journal() as journal:
                plan.structure.append(_edited(plan, rule, matched, journal))
        except SurgeryError as error:
            plan.problems.append(error)
            return


def _edited(plan: Plan, rule: StructureRule, matched: Sequence[Match], journal: Journal) -> Restructuring:
    state, record = model_state(plan.model), Restructuring(plan.adapter, rule)
    statuses = list(state.standing.values()) if state is not None else []
    rules = [rule for rules in state.adapters.values() for rule in rules] if state is not None else []
    edits = ModelEdits(plan.model, journal, (*statuses, *rules), check_resizable)

    def change() -> None:
        broken = broken_ties(plan.model)
        with HookCall(rule, "restructure", ", ".join(match.path for match in matched[:3])):
            rule.restructure(edits, [(match.path, match.module) for match in matched])
        if broken_ties(plan.model) - broken:  # such as that of a head whose module was exchanged
            declare_broken(edits)
        record.edits, record.copies, record.steps = edits.edits, edits.copies, edits.steps
        if state is not None:
            check_exchanged(state.sites(), record)
        record.unplain, record.tensors = edits.unplain, edits.tensors

    moved_along(plan.model, state, record, journal, change)
    plan.warnings += edits.warnings
    return record
