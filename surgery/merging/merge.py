"""Merging: rules with a closed form are folded into the base's own parameters, and taken out again to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surgery.arithmetic.exact_fold import LowRank, Rows, weighted
from surgery.arithmetic.sharded_tensors import sharding_of
from surgery.authoring.hook_call import HookCall
from surgery.authoring.live_site import LiveSite
from surgery.errors import MergeError, PlanError, SurgeryError, SurgeryWarning
from surgery.forward.own_forward import own_forward
from surgery.forward.packed_weights import UNPACKED, is_packed
from surgery.forward.parameter_view import tensor_at
from surgery.merging.linear_delta import merged_by
from surgery.merging.site_folding import Keep, SiteFolding, check_foldable, fold_together, verify_records
from surgery.model_record.verb_root import rewritten, with_lost
from surgery.patterns.parameter_owners import Owners
from surgery.state.absent_values import without_values
from surgery.state.adapter_tensors import box_of, tensors_of
from surgery.state.in_use import check_free
from surgery.state.record_undo import keep_site, take_out_folds
from surgery.state.records import Applied, Merged, SiteState, adapter_names, sites
from surgery.state.tied_weights import Untied, retie, say_untied
from surgery.transaction.neutral_context import verb
from surgery.transaction.undo_log import Journal
from surgery.weaving.conflicts import hidden
from surgery.weaving.generated_class import reason_against
from surgery.weaving.recording import layer_of
from surgery.weaving.site_class import install_live

__all__ = ["MergeReport", "merge", "unmerge"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: adapters, sites, and the bytes kept so that `unmerge` gives the bits back."""

    adapters: tuple[str, ...]
    sites: int
    nbytes: int
    entries: int

    def __str__(self) -> str:
        each = f", {self.nbytes / self.entries:.3f} bytes an entry" if self.entries else ""
        return f"merged {', '.join(self.adapters)} at {self.sites} sites; keeps {self.nbytes:,} bytes to unmerge{each}"


@verb
def merge(
    model: nn.Module,
    adapter: str | Sequence[str] | None = None,
    *,
    keep: Keep = "record",
    untie: bool = False,
    safe: bool = False,
) -> MergeReport:
    """Fold an adapter (or all) into the base's own parameters; the sites get their own classes back.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, merge, unmerge
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 8)), [LoraRule("0", rank=2, init="gaussian")])
    >>> before = model[0].weight.clone()
    >>> print(merge(model).sites, type(model[0]) is nn.Linear)
    1 True
    >>> _ = unmerge(model)
    >>> torch.equal(model[0].weight, before)
    True

    `keep="record"` (default) keeps a small correction record (see `surgery.arithmetic.exact_fold`) and is exact
    whatever the number of threads or the device; `keep="copy"` keeps the original weights, which is faster.
    `untie=True` gives a site whose weight another module shares one of its own while merged; a model of transformers
    says meanwhile, in its config and elsewhere, that nothing is tied, so that `tie_weights` and checkpoints keep it.
    `safe=True` (PEFT's safe_merge) refuses results that are not finite before anything is touched.

    Raises `MergeError` (or `PlanError` with one for each site) where a rule has no closed form, a weight is shared,
    packed or sharded, or the model is merged with other adapters; the model is then as it was. Where just these are
    merged already, nothing happens, and a `SurgeryWarning` says so.
    """
    model, state = rewritten(model)
    names = adapter_names(state, adapter)
    check_free(model)
    if adapter is None:
        names = [name for name in names if state.standing[name].live]
    live = [name for name, standing in state.standing.items() if standing.live]  # idle ones do nothing
    counting = {*names, *live}
    at, beside = state.rules_at(names), state.rules_at(counting)
    for _, module, site in sites(model):
        if id(module) not in beside:  # one that is none by the record, such as a copy of a layer
            beside[id(module)] = [applied for applied in site.applied if applied.adapter in counting]
            at[id(module)] = [applied for applied in site.applied if applied.adapter in names]
    found = [(path, module, site) for path, module, site in sites(model) if at.get(id(module))]
    problems = [
        problem
        for path, module, site in found
        for problem in _objections(path, module, site, at[id(module)], beside[id(module)])
    ]
    merged = [(path, module, site) for path, module, site in sites(model) if site.merged is not None]
    if merged and all(set(_merged(site).adapters) == set(names) for _, _, site in merged):
        told = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} merged already: nothing happens"
        warnings.warn(told, SurgeryWarning, stacklevel=3)
        return _report(names, merged)
    problems += [_already(path, site) for path, _, site in merged][:1]
    if problems:
        raise PlanError(problems)
    owners, waiting = Owners(model), list[Any]()
    with torch.no_grad():
        if safe:
            for path, module, site in found:
                _check_finite(owners, path, module, site, at[id(module)], untie)
        with Journal() as journal:
            for path, module, site in found:
                _merge_site(owners, path, module, site, names, at[id(module)], keep, untie, journal, waiting)
                staying = [one for one in beside[id(module)] if one.live and one.adapter not in names]
                install_live(module, journal, live=staying)
            fold_together(waiting)
            if any(_merged(site).tied for _, _, site in found):
                journal.keep(state.__dict__)
                state.untied = say_untied(model, journal)
    return _report(names, found)


def _report(names: Sequence[str], found: Sequence[tuple[str, nn.Module, SiteState]]) -> MergeReport:
    folds = [(tensor_at(module, name), record) for _, module, site in found for name, record in _merged(site).folds]
    entries = {id(tensor): tensor.numel() for tensor, _ in folds}
    return MergeReport(tuple(names), len(found), sum(record.nbytes for _, record in folds), sum(entries.values()))


@verb
def unmerge(model: M, *, check: bool = True) -> M:
    """Take out what `merge` folded in: the base's bits and the live adapters are as before. See `merge`.

    A base weight that changed while merged is a `MergeError`, found by checksum before anything is touched;
    `check=False` takes the fold out all the same, as well as it can be. Where nothing is merged, nothing happens, and a
    `SurgeryWarning` says so.
    """
    root, state = rewritten(model, lost=not check)
    check_free(root)
    if not any(site.merged is not None for _, _, site in with_lost(root, state)):
        warnings.warn("nothing is merged: nothing happens", SurgeryWarning, stacklevel=3)
    return unmerged(model, check)


@verb
def unmerged(model: M, check: bool = True) -> M:
    """The model with nothing merged, whether or not anything was."""
    root, state = rewritten(model, lost=not check)
    found = [(path, module, site) for path, module, site in with_lost(root, state) if site.merged is not None]
    for path, module, site in found:
        if site.merged is not None and site.merged.folds and (refused := sharding_of(module)) is not None:
            why = f"{refused[0]}; what the merge folded in was noted of whole ones"
            fix = "unmerge(model) before sharding, or forget(model) to keep the weights as they are"
            raise MergeError("the site can't be unmerged", where=path, why=why, fix=fix)
    folds = [(tensor_at(module, name), r, path) for path, module, site in found for name, r in _merged(site).folds]
    verify_records([(tensor, record) for tensor, record, _ in folds], [path for *_, path in folds], check)
    live = state.rules_at([name for name, standing in state.standing.items() if standing.live])
    with torch.no_grad(), Journal() as journal:
        take_out_folds(journal, folds[::-1], check=check)
        for _, module, site in found:
            keep_site(journal, module)
            merged = _merged(site)
            for name, parameter in merged.tied.items():
                held_by = _owner(module, name)._parameters
                journal.keep(held_by)
                held_by[name.rpartition(".")[2]] = parameter
            site.merged = None
            install_live(module, journal, live=live.get(id(module)))
        journal.keep(state.__dict__)
        retie(root, state.untied, journal)
        state.untied = Untied()
    return model


# One site -----------------------------------------------------------------------------------------------------


def _merge_site(
    owners: Owners,
    path: str,
    module: nn.Module,
    site: SiteState,
    names: list[str],
    chosen: list[Applied],
    keep: Keep,
    untie: bool,
    journal: Journal,
    waiting: list[Any],
) -> None:
    keep_site(journal, module)
    merged = Merged(tuple(names))
    folding = SiteFolding(module, path, keep, journal)
    for changes in _changes(module, site, chosen, folding):
        for name, change in changes.items():
            check_foldable(owners, module, name, change, path, untie)
            if untie and name not in merged.tied:
                _untie(owners, module, name, merged, journal)
            folding.add(name, change)
    merged.folds = folding.finish_with(waiting)
    site.merged = merged


def _check_finite(
    owners: Owners, path: str, module: nn.Module, site: SiteState, chosen: list[Applied], untie: bool
) -> None:
    folding = SiteFolding(module, path, "copy", Journal(), dry=True)
    for changes in _changes(module, site, chosen, folding):
        for name, change in changes.items():
            check_foldable(owners, module, name, change, path, untie)
            folding.add(name, change)
    broken = folding.finite()
    if broken is not None:
        raise MergeError(
            f"merging gives a {broken} that is not finite",
            where=path,
            why="an adapter's tensors hold NaN or infinity, or the sum overflows the base's dtype",
            fix="inspect adapter_state_dict(model, name), or merge in a wider dtype",
        )


def _changes(module: nn.Module, site: SiteState, chosen: list[Applied], folding: SiteFolding) -> Any:
    # As in the graph: a rule that puts another parameter in the base's place acts before those that add to its output,
    # and one that changes the input acts on all of them, the last to come first.
    own = own_forward(module, site.base) if len(chosen) > 1 else None  # one rule alone needs no order
    replacing, adding, on_input = [], [], []
    for applied in chosen:
        replaced = layer_of(applied, module, site.path, own).tape.replaced() if own is not None else ()
        kinds = {ref.kind for ref in replaced} or {"output"}
        (replacing if kinds <= {"state"} else on_input if kinds == {"input"} else adding).append(applied)
    for index, applied in enumerate(replacing + adding + on_input[::-1]):
        if index == len(replacing):
            folding.mark_base()
        live = LiveSite(module, site.path, applied.adapter, tensors_of(module, applied.adapter), folding.source)
        with HookCall(applied.rule, "merged", site.path):
            changes = dict(merged_by(applied.rule, live))
            for name, change in changes.items():
                if not isinstance(change, (LowRank, Rows, Tensor)):
                    raise TypeError(f"{name} is given a {type(change).__name__}, not a tensor, LowRank or Rows")
        if applied.weight != 1.0:
            changes = {name: weighted(change, live.tensor(name), applied.weight) for name, change in changes.items()}
        yield changes


def _untie(owners: Owners, module: nn.Module, name: str, merged: Merged, journal: Journal) -> None:
    parameter = tensor_at(module, name)
    if not isinstance(parameter, nn.Parameter) or len(owners.of(parameter)) < 2:
        return
    owner, last = _owner(module, name), name.rpartition(".")[2]
    own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    journal.keep(owner._parameters)
    owner._parameters[last] = own
    owners.note_replacement(owner, last, parameter, own)
    merged.tied[name] = parameter


def _objections(
    path: str, module: nn.Module, site: SiteState, chosen: list[Applied], counting: list[Applied]
) -> list[SurgeryError]:
    """Why these rules can't be merged at a site, where `counting` are they and what else is live there."""
    found: list[SurgeryError] = []
    refused = reason_against(module)
    if refused is not None:
        found.append(MergeError("the site can't be merged", where=path, why=refused[0], fix=refused[1]))
    for name in dict.fromkeys(applied.adapter for applied in chosen):
        if (box := box_of(module, name)) is not None and without_values(box):
            why = "its tensors came from the meta device by to_empty"
            found.append(
                MergeError(f"the adapter {name!r} has no values yet", where=path, why=why, fix="load them first")
            )
    for applied in chosen:
        rule = applied.rule
        if not rule.mergeable:
            why = rule.why_not_merged
            found.append(MergeError(f"{rule.label} can't be merged", where=path, why=why, fix="keep it unmerged"))
    if len(chosen) < len(counting) and not all(applied.rule.additive for applied in counting):
        others = ", ".join(
            f"{a.rule.label} [{a.adapter}]" for a in counting if a.adapter not in {one.adapter for one in chosen}
        )
        why = f"{others} is on the same site, and what it does depends on the order"
        found.append(
            MergeError(
                "part of a stack can't be merged here", where=path, why=why, fix="merge all adapters: merge(model)"
            )
        )
    if not found and len(chosen) > 1:
        problem = hidden(chosen, module, site.path, own_forward(module, site.base))
        found += [problem] if problem is not None else []
    if not found:
        found += _packed(path, module, site, chosen)
    return found


def _packed(path: str, module: nn.Module, site: SiteState, chosen: list[Applied]) -> list[SurgeryError]:
    weight = module._parameters.get("weight")
    if weight is None or not (hasattr(weight, "device_mesh") or is_packed(weight)):
        return []
    why, fix = f"its weight is a {type(weight).__name__} of {weight.dtype}", "keep it unmerged"
    if is_packed(weight):
        why, fix = f"{why}: quantised, so a sum would be rounded away", f"keep it unmerged, or {UNPACKED}"
    return [MergeError(f"{chosen[0].rule.label} can't be merged here", where=path, why=why, fix=fix)]


def _already(path: str, site: SiteState) -> MergeError:
    held_now = ", ".join(_merged(site).adapters)
    return MergeError(
        "the model is merged already", where=path, why=f"its weights hold {held_now}", fix="unmerge(model) first"
    )


def _merged(site: SiteState) -> Merged:
    assert site.merged is not None
    return site.merged


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])
