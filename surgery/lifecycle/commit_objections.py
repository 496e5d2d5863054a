"""Reasons against a commit, gathered before anything changes, and what becomes of each site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from surgery.authoring.hook_call import HookCall
from surgery.authoring.live_site import LiveSite
from surgery.errors import MergeError, SiteError, SurgeryError
from surgery.forward.offloaded_weights import value_at
from surgery.merging.merge_objections import already_merged, objections_to_merge
from surgery.patterns.module_class import class_of
from surgery.patterns.module_walk import base_modules
from surgery.state.adapter_tensors import tensors_of
from surgery.state.records import Applied, ModelState, SiteState, site_state, sites
from surgery.state.restructuring import set_aside_modules
from surgery.weaving.class_objections import reason_against

__all__ = ["CommittedSite", "find_objections"]


@dataclass(frozen=True)
class CommittedSite:
    """A site of committed adapters: their rules there, and the module that takes its place, if any.

    `merged`: the rules are in its weights already.
    """

    path: str
    module: nn.Module
    site: SiteState
    rules: list[Applied]
    replacement: nn.Module | None = None
    merged: bool = False


def find_objections(
    root: nn.Module, state: ModelState, names: Sequence[str]
) -> tuple[list[CommittedSite], list[SurgeryError]]:
    """Returns what becomes of each site of these adapters, and why they can't be committed."""
    problems = [*_of_structure(root, state, names)]
    committed: list[CommittedSite] = []
    for path, module, site in sites(root):
        rules = [applied for _, applied in site.of(names)]
        if rules and site.merged is not None and not {*site.merged.adapters} <= {*names}:
            problems.append(already_merged(path, site.merged))
        elif rules:
            committed.append(_site(root, path, module, site, rules, problems))
    problems += _of_replaced(root, state, names, committed)
    return committed, problems


def _site(
    root: nn.Module, path: str, module: nn.Module, site: SiteState, rules: list[Applied], problems: list[SurgeryError]
) -> CommittedSite:
    here = CommittedSite(path, module, site, rules, merged=site.merged is not None)
    if site.merged is not None:
        waiting = [applied.adapter for applied in rules if applied.adapter not in site.merged.adapters]
        problems += [already_merged(path, site.merged)] if waiting else []
        return here
    lasting = [applied for applied in rules if not applied.rule.mergeable and not applied.rule.replaces_module]
    if lasting:
        problems += [_unplain(path, applied) for applied in lasting]
        return here
    replacing = next((applied for applied in rules if applied.rule.replaces_module), None)
    if replacing is None:
        problems += objections_to_merge(path, module, site, rules, site.live())
        return here
    why = _why_not_replaced(root, path, module, site, replacing)
    if why is not None:
        problems.append(SiteError(f"{_label(replacing)} can't be committed", where=path, why=why[0], fix=why[1]))
        return here
    try:
        return CommittedSite(path, module, site, rules, _replacement(path, module, replacing))
    except SurgeryError as error:
        error.fix = error.fix or _keep(replacing)
        problems.append(error)
        return here


def _replacement(path: str, module: nn.Module, applied: Applied) -> nn.Module:
    tensors = tensors_of(module, applied.adapter)
    live = LiveSite(module, path, applied.adapter, tensors, lambda name, _: value_at(module, name))
    with HookCall(applied.rule, "committed", path):
        return applied.rule.committed(live)


def _why_not_replaced(
    root: nn.Module, path: str, module: nn.Module, site: SiteState, applied: Applied
) -> tuple[str, str] | None:
    """Why another module can't take a site's place, and what to do."""
    if module is root:
        return "it is on the model itself, which has no parent to put another module into", "keep it live"
    others = [other for other in site.live() if other is not applied]
    if others:
        return f"{_label(others[0])} is on the same site", f"remove {others[0].adapter!r} first"
    if applied.weight != 1.0:
        return f"it is live with the weight {applied.weight:g}", "make it live with weight 1"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    own = [hook for table in hooks for hook in table.values() if not type(hook).__module__.startswith("surgery.")]
    if own:
        return f"the {class_of(module).__name__} there has hooks of other code", "remove the hooks first"
    return reason_against(module)


def _label(applied: Applied) -> str:
    return f"{applied.rule.label} [{applied.adapter}]"


def _unplain(path: str, applied: Applied) -> SurgeryError:
    return MergeError(
        f"{_label(applied)} can't be committed", where=path, why=applied.rule.why_not_merged, fix=_keep(applied)
    )


def _keep(applied: Applied) -> str:
    return f"keep it live, or remove(model, {applied.adapter!r}); commit(model, […]) takes other adapters"


# What stays on the model ------------------------------------------------------------------------------------------


def _of_structure(root: nn.Module, state: ModelState, names: Sequence[str]) -> list[SurgeryError]:
    """Why structural rules that stay can't do without the committed adapters."""
    problems: list[SurgeryError] = []
    staying = [record for record in state.structure if record.adapter not in names]
    for index, record in enumerate(state.structure):
        below = [other for other in state.structure[:index] if other in staying and other.keys & record.keys]
        if record.adapter in names and below:
            problems.append(
                SurgeryError(
                    f"{record.rule.label} [{record.adapter}] can't be committed alone",
                    why=f"{below[0].rule.label} [{below[0].adapter}] changed the same modules before, and stays",
                    fix=f"commit {below[0].adapter!r}, too",
                )
            )
    for module in set_aside_modules(root, staying):
        site = site_state(module)
        waiting = site.of(names) if site is not None else []
        if site is not None and waiting:
            adapter = waiting[0][1].adapter
            problems.append(
                SurgeryError(
                    f"the adapter {adapter!r} can't be committed alone",
                    where=site.path,
                    why="it has rules on a layer that a structural rule took out, and that rule stays",
                    fix=f"commit {', '.join(repr(record.adapter) for record in staying)}, too",
                )
            )
            break
    return problems


def _of_replaced(
    root: nn.Module, state: ModelState, names: Sequence[str], committed: Sequence[CommittedSite]
) -> list[SurgeryError]:
    """Why what stays on the model needs modules that would be replaced."""
    replaced = {id(site.module): site for site in committed if site.replacement is not None}
    if not replaced:
        return []
    problems: list[SurgeryError] = []
    for site in replaced.values():
        for path, below in base_modules(site.module):
            inner = site_state(below) if path else None
            staying = [a for a in inner.applied if a.adapter not in names] if inner is not None else []
            if staying:
                why = f"{_label(staying[0])}, which stays, is on {path} inside it"
                fix = f"commit or remove {staying[0].adapter!r}, too"
                problems.append(
                    SiteError(f"{_label(site.rules[0])} can't be committed", where=site.path, why=why, fix=fix)
                )
    for record in state.structure:
        if record.adapter in names:
            continue
        noted = {id(below) for module in record.modules_of("after") for _, below in base_modules(module)}
        owners = {key for key, table, _ in record.keys if table == "_modules"}
        for site in replaced.values():
            if id(site.module) in noted or any(
                id(parent) in owners and site.module in parent._modules.values() for parent in root.modules()
            ):
                why = f"{record.rule.label} [{record.adapter}], which stays, has to find the module there"
                fix = f"commit {record.adapter!r}, too"
                problems.append(
                    SiteError(f"{_label(site.rules[0])} can't be committed", where=site.path, why=why, fix=fix)
                )
    return problems
