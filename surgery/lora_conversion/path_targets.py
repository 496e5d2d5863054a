"""Rules for known paths: few rules, with names as their targets where these match nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from surgery.authoring.hook_call import HookCall
from surgery.authoring.rule import Rule
from surgery.errors import MatchError
from surgery.patterns.paths import regex_for
from surgery.planning.matching import Tree, matches

__all__ = ["modules_of", "targeted_rules"]


def modules_of(model: nn.Module, rule: Rule) -> set[int]:
    """Returns the ids of the modules that a rule's targets match. Raises `MatchError` if they match nothing."""
    return {id(match.module) for match in matches(Tree.of(model), rule)}


def targeted_rules(model: nn.Module, rules: Mapping[str, Rule]) -> Iterator[Rule]:
    """Yields rules that match exactly these paths. Rules that differ in ranks alone become one rule."""
    if not rules:
        return
    first, tree = next(iter(rules.values())), Tree.of(model)
    groups: list[tuple[Rule, list[str]]] = []
    for path, rule in first.united(rules).items():
        bare = rule.replace(targets=(), exclude=(), layers=None, expect=None)
        own = next((paths for other, paths in groups if other == bare), None)
        if own is None:
            groups.append((bare, own := []))
        own.append(path)
    for rule, paths in groups:
        wanted = {id(model.get_submodule(path)) for path in paths}
        named = rule.replace(targets=tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths)))
        yield named if _sites(tree, named) == wanted else rule.replace(targets=regex_for(paths))


def _sites(tree: Tree, rule: Rule) -> set[int]:
    try:
        matched = matches(tree, rule)
    except MatchError:
        return set()
    sites = set[int]()
    for match in matched:
        with HookCall(rule, "expand", match.path):
            sites.update(id(module) for _, module in rule.expand(match.module, match.path))
    return sites
