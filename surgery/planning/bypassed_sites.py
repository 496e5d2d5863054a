"""Code that reads parameters past their module: rules there are refused, or a fast path of torch is switched off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgery.authoring.rule import Rule
from surgery.errors import SiteError
from surgery.patterns.wrappers import submodule
from surgery.planning.direct_reads import fastpath_switch
from surgery.planning.matching import Match, Tree
from surgery.planning.plan import Plan
from surgery.planning.read_search import Bypass
from surgery.planning.uncalled_modules import never_called

__all__ = ["DirectReads", "check_bypasses", "fast_paths", "switch_fast_paths"]


@dataclass(frozen=True)
class DirectReads:
    """The code that reads parameters past a module's forward, by path, and torch's fast paths that can be switched off
    (path → attribute, value)."""

    by_path: dict[str, list[Bypass]]
    fast_paths: dict[str, tuple[str, Any]]

    def of(self, match: Match) -> list[Bypass]:
        return [bypass for path in (match.path, *match.aliases) for bypass in self.by_path.get(path, ())]


def check_bypasses(plan: Plan, rule: Rule, match: Match, reads: list[Bypass], is_companion: bool) -> bool:
    """Whether a rule can go to a module whose parameters other code reads directly.

    If not, a rule gets a problem; a companion skips the module with a warning.
    """
    path = match.path
    for bypass in reads:
        if bypass.in_fast_path and fastpath_switch(submodule(plan.model, bypass.reader)):
            continue  # the plan switches that code off
        place = f"{bypass.reader_type} reads its {bypass.parameter} directly, at {bypass.file}:{bypass.line}"
        uncalled = bypass.conditional and never_called(plan.model, (path, *match.aliases))
        if bypass.conditional and not uncalled:
            plan.warnings.append(f"{rule.label} at {path} is bypassed on one branch: {place}: {bypass.source}")
            continue
        if is_companion:
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


def fast_paths(tree: Tree) -> dict[str, tuple[str, Any]]:
    """torch's encoders whose inference fast path is on: path → the attribute and the value that switch it off."""
    switches = ((path, module, fastpath_switch(module)) for path, module in tree.modules.items())
    return {path: switch for path, module, switch in switches if switch and getattr(module, switch[0]) != switch[1]}


def switch_fast_paths(plan: Plan, path: str, fast_paths: dict[str, tuple[str, Any]]) -> None:
    """Plan to switch off the fast paths of the encoders around a site, which bypass their children's forwards."""
    if not fast_paths:
        return
    while path:
        path = path.rpartition(".")[0]
        if path in fast_paths:
            plan.switches[path] = fast_paths[path]
