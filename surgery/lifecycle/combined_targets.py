"""Finds the rules of a combined adapter, with targets that match exactly its sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from surgery.authoring.equal_rules import ByRule
from surgery.authoring.hook_call import HookCall
from surgery.authoring.rule import Rule
from surgery.errors import MatchError, SiteError
from surgery.lifecycle.rule_groups import RuleGroup
from surgery.patterns.paths import regex_for
from surgery.planning.matching import Tree, matches

__all__ = ["rules_of_groups"]


def rules_of_groups(model: nn.Module, groups: Sequence[RuleGroup]) -> list[Rule]:
    """The new adapter's rules, each with targets that match its sites; companions are not listed."""
    tree = Tree.of(model)
    main = [group for group in groups if not group.companion]
    rules = [rule for group in main for rule in _targeted_rules(tree, group)]
    companions = [companion for rule in rules for companion in rule.companions()]
    for group in (group for group in groups if group.companion):
        group_sites = {id(at_site.module) for at_site in group.at_sites}
        fitting = [rule for rule in companions if rule.name == group.name and _sites(tree, rule) == group_sites]
        if len(fitting) == 1:
            companions.remove(fitting[0])
            for at_site in group.at_sites:
                at_site.rule = fitting[0]
        else:
            rules += _targeted_rules(tree, group)
    if any(_sites(tree, rule) for rule in companions):  # companions would match sites where the adapters differ
        return _without_companions(tree, groups)
    return rules


def _without_companions(tree: Tree, groups: Sequence[RuleGroup]) -> list[Rule]:
    """As `rules_of_groups`, with every rule listed and no companions."""
    for at_site in (at_site for group in groups for at_site in group.at_sites):
        assert at_site.rule is not None
        at_site.rule = at_site.rule.alone()
    return [rule for group in groups for rule in _targeted_rules(tree, group)]


def _targeted_rules(tree: Tree, group: RuleGroup) -> list[Rule]:
    """One group's rules, united if possible, with the adapters' own targets if these match the same sites."""
    by_path = {at_site.path: at_site.rule for at_site in group.at_sites if at_site.rule is not None}
    first = next(iter(by_path.values()))
    paths_by_rule, groups_by_rule = dict[int, tuple[Rule, list[str]]](), ByRule[tuple[Rule, list[str]]]()
    for path, rule in first.united(by_path).items():
        bare = rule.replace(targets=(), exclude=(), layers=None, expect=None)
        rule_paths = groups_by_rule.get(bare, lambda bare=bare: (bare, []))
        paths_by_rule[id(rule_paths)] = rule_paths
        rule_paths[1].append(path)
    results: list[Rule] = []
    for rule, paths in paths_by_rule.values():
        chosen = set(paths)
        at_chosen = [at_site for at_site in group.at_sites if at_site.path in chosen]
        new = _with_own_targets(tree, group, rule) if len(paths_by_rule) == 1 else None
        results.append(new or _by_paths(tree, rule, {at_site.path: at_site.module for at_site in at_chosen}))
        for at_site in at_chosen:
            at_site.rule = results[-1]
    return results


def _with_own_targets(tree: Tree, group: RuleGroup, rule: Rule) -> Rule | None:
    """The rule with the adapters' own targets; None unless these match the sites of all adapters."""
    first, *other_rules = group.rules
    selection: dict[str, Any] = {"targets": first.targets, "exclude": first.exclude, "layers": first.layers}
    if all((other.targets, other.exclude, other.layers) == tuple(selection.values()) for other in other_rules):
        alike = all(paths == {at_site.path for at_site in group.at_sites} for paths in group.paths.values())
        return rule.replace(**selection) if alike else None
    if any(other.exclude or other.layers is not None for other in group.rules):
        return None
    words = dict.fromkeys(word for other in group.rules for word in cast(tuple, other.targets) if isinstance(word, str))
    joined = rule.replace(targets=tuple(words))
    return joined if _sites(tree, joined) == {id(at_site.module) for at_site in group.at_sites} else None


def _by_paths(tree: Tree, rule: Rule, modules: Mapping[str, nn.Module]) -> Rule:
    """The rule with a regular expression of the paths as its target. `SiteError` if it matches other modules."""
    new = rule.replace(targets=regex_for(list(modules)))
    reached = _sites(tree, new)
    if reached != {id(module) for module in modules.values()}:
        lost = [path for path, module in modules.items() if id(module) not in reached]
        raise SiteError(
            f"no targets of one {rule.label} match the adapters' sites exactly",
            where=", ".join(lost[:3]) or None,
            why="modules were renamed since the rules were applied" if lost else "the targets match further modules",
            fix="combine adapters that have this rule at the same modules",
        )
    return new


def _sites(tree: Tree, rule: Rule) -> set[int]:
    """The ids of the sites that a rule's targets match; none if they match nothing."""
    try:
        matched = matches(tree, rule)
    except MatchError:
        return set()
    inner = set[int]()
    for match in matched:
        with HookCall(rule, "expand", match.path):
            inner.update(id(module) for _, module in rule.expand(match.module, match.path))
    return inner
