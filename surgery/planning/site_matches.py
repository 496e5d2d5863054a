"""Finds the modules of a rule: those that its targets match, expanded to its sites."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from surgery.authoring.hook_call import HookCall
from surgery.authoring.rule import Rule
from surgery.errors import MatchError, SurgeryError, collapse_similar
from surgery.planning.matching import Match, Tree, matches, unmatched_targets
from surgery.planning.plan import Plan
from surgery.planning.rewrite_placement import place_rule

__all__ = ["match_sites", "nothing_to_do"]


def match_sites(plan: Plan, tree: Tree, rule: Rule, is_companion: bool) -> list[Match] | None:
    """The modules that a rule rewrites, each once: its matches, expanded. None if the rule's targets do not match."""
    try:
        with HookCall(rule, "structures", ""):
            structures = rule.structures()
    except SurgeryError as error:
        plan.problems.append(error)
        return None
    if structures:
        plan.warnings += unmatched_targets(tree, rule)
        return place_rule(plan, tree, rule, structures)
    try:
        matched = matches(tree, rule)
        plan.warnings += [] if is_companion else unmatched_targets(tree, rule)
    except MatchError as error:
        if not is_companion:
            plan.problems.append(error)
        return None
    targets: dict[int, Match] = {}
    for match in matched:
        try:
            expanded = _expand(rule, match)
        except SurgeryError as error:
            plan.problems.append(error)
            continue
        for path, module in expanded:
            aliases = tuple(alias for alias in tree.paths[id(module)] if alias != path)
            targets.setdefault(id(module), Match(path, module, aliases))
    if not targets and not is_companion:
        plan.problems.append(nothing_to_do(rule, [match.path for match in matched]))
    return list(targets.values())


def _expand(rule: Rule, match: Match) -> list[tuple[str, nn.Module]]:
    if type(rule).expand is Rule.expand:
        return [(match.path, match.module)]
    with HookCall(rule, "expand", match.path):
        return list(rule.expand(match.module, match.path))


def nothing_to_do(rule: Rule, paths: Sequence[str], reasons: Sequence[str] = ()) -> MatchError:
    """Return the error for a rule whose matches hold nothing that it could rewrite."""
    return MatchError(
        f"{rule.label} finds nothing to do in what it matches",
        where=", ".join(paths[:3]),
        why="; ".join(collapse_similar(list(reasons))) or None,
    )
