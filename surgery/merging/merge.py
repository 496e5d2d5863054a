"""`merge` and `unmerge`: fold rules with a closed form into the base's parameters, and take them out to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surgery.arithmetic.exact_fold import Change, LowRank, Rows, scale_change
from surgery.authoring.hook_call import HookCall
from surgery.authoring.live_site import LiveSite
from surgery.errors import MergeError, PlanError, SurgeryError, SurgeryWarning
from surgery.forward.own_forward import own_forward
from surgery.forward.packed_weights import UNPACKED, is_packed
from surgery.forward.parameter_view import tensor_at
from surgery.merging.linear_delta import merged_tensors
from surgery.merging.site_folding import Keep, SiteFolding, check_foldable, fold_together, verify_records
from surgery.rewritten_model.verb_root import rewritten, with_lost
from surgery.sharded_tensors import sharding_of
from surgery.state.absent_values import without_values
from surgery.state.adapter_naming import adapter_names
from surgery.state.adapter_tensors import box_of, tensors_of
from surgery.state.in_use import check_free
from surgery.state.parameter_owners import Owners
from surgery.state.record_undo import keep_site, take_out_folds
from surgery.state.records import Applied, Merged, ModelState, Sites, SiteState, sites
from surgery.state.tied_weights import Untied, retie, say_untied
from surgery.transaction.neutral_context import verb
from surgery.transaction.undo_log import Journal
from surgery.weaving.class_objections import reason_against
from surgery.weaving.conflicts import find_live_conflict
from surgery.weaving.rewrite_recording import layer_of
from surgery.weaving.site_class import install_live

__all__ = ["MergeReport", "NotFiniteError", "merge", "unmerge"]

M = TypeVar("M", bound=nn.Module)


class NotFiniteError(MergeError):
    """A merge with `safe` gives values that are not finite."""


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    Attributes:
        adapters: the names of the merged adapters.
        sites: the number of sites.
        nbytes: the bytes kept so that `unmerge` restores the weights' bits.
        entries: the number of entries of the folded weights.
    """

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
    """Fold adapters into the base's parameters, so their sites run their own classes again.

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

    Args:
        model: the model.
        adapter: a name or several names. None: all live adapters.
        keep: "record" keeps a small correction (see `surgery.arithmetic.exact_fold`), exact for any number of threads
            and any device. "copy" keeps the original weights, which is faster.
        untie: whether a site whose weight another module shares gets a weight of its own while merged. The config of a
            transformers model then says that nothing is tied, so `tie_weights` and checkpoints keep the weights apart.
        safe: whether results that are not finite raise before the model changes (PEFT's safe_merge).

    Returns:
        A `MergeReport`. If exactly these adapters are merged already, nothing happens, and a `SurgeryWarning` says so.

    Raises:
        PlanError: one `MergeError` for each site with a rule without a closed form, or with a packed or sharded weight.
        MergeError: a weight that another module shares, or a result that is not finite.
        SurgeryError: an unknown adapter. In all cases the model is unchanged.

    PEFT: `merge_adapter`.
    """
    model, state = rewritten(model)
    names = adapter_names(state, adapter)
    check_free(model)
    if adapter is None:
        names = [name for name in names if state.standing[name].live]
    live = [name for name, standing in state.standing.items() if standing.live]  # idle adapters have no effect
    counted = {*names, *live}
    chosen_at, all_at = state.rules_at(names), state.rules_at(counted)
    all_sites = list(sites(model))
    for _, module, site in all_sites:
        if id(module) not in all_at:  # not in the model record, such as a copied layer
            all_at[id(module)] = [applied for applied in site.applied if applied.adapter in counted]
            chosen_at[id(module)] = [applied for applied in site.applied if applied.adapter in names]
    chosen_sites = [(path, module, site) for path, module, site in all_sites if chosen_at.get(id(module))]
    problems = [
        problem
        for path, module, site in chosen_sites
        for problem in _objections(path, module, site, chosen_at[id(module)], all_at[id(module)])
    ]
    merged = [(path, module, site) for path, module, site in all_sites if site.merged is not None]
    if merged and all(set(_merged(site).adapters) == set(names) for _, _, site in merged):
        warning = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} merged already: nothing happens"
        warnings.warn(warning, SurgeryWarning, stacklevel=3)
        return _report(names, merged)
    problems += [_already(path, site) for path, _, site in merged][:1]
    if problems:
        raise PlanError(problems)
    owners, waiting = Owners(model), list[Any]()
    with torch.no_grad():
        if safe:
            for path, module, site in chosen_sites:
                _check_finite(owners, path, module, site, chosen_at[id(module)], untie)
        with Journal() as journal:
            for path, module, site in chosen_sites:
                _merge_site(owners, path, module, site, names, chosen_at[id(module)], keep, untie, journal, waiting)
                staying = [
                    rule_record
                    for rule_record in all_at[id(module)]
                    if rule_record.live and rule_record.adapter not in names
                ]
                install_live(module, journal, live=staying)
            fold_together(waiting)
            if any(_merged(site).tied for _, _, site in chosen_sites):
                journal.keep(state.__dict__)
                state.untied = say_untied(model, journal)
    return _report(names, chosen_sites)


def _report(names: Sequence[str], merged_sites: Sequence[tuple[str, nn.Module, SiteState]]) -> MergeReport:
    folds = [
        (tensor_at(module, name), record) for _, module, site in merged_sites for name, record in _merged(site).folds
    ]
    entries = {id(tensor): tensor.numel() for tensor, _ in folds}
    return MergeReport(
        tuple(names), len(merged_sites), sum(record.nbytes for _, record in folds), sum(entries.values())
    )


@verb
def unmerge(model: M, *, check: bool = True) -> M:
    """Take the folds of `merge` out of the weights: the base's bits and the live adapters are restored. See `merge`.

    Args:
        model: the model. If nothing is merged, nothing happens, and a `SurgeryWarning` says so.
        check: whether a weight must be unchanged since the merge, by its checksum. False: subtract the folds anyway.

    Returns:
        The same model object.

    Raises:
        MergeError: a base weight changed while merged, or is quantised or sharded now. The model is unchanged.

    PEFT: `unmerge_adapter`.
    """
    root, state = rewritten(model, lost=not check)
    check_free(root)
    found = _merged_sites(root, state)
    if not found:
        warnings.warn("nothing is merged: nothing happens", SurgeryWarning, stacklevel=3)
    _unmerge(root, state, found, check)
    return model


@verb
def ensure_unmerged(model: M, check: bool = True) -> M:
    """Unmerge the model if it is merged."""
    root, state = rewritten(model, lost=not check)
    _unmerge(root, state, _merged_sites(root, state), check)
    return model


def _merged_sites(root: nn.Module, state: ModelState) -> Sites:
    return [(path, module, site) for path, module, site in with_lost(root, state) if site.merged is not None]


def _unmerge(root: nn.Module, state: ModelState, merged_sites: Sites, check: bool) -> None:
    for path, module, site in merged_sites:
        if site.merged is not None and site.merged.folds and (refused := sharding_of(module)) is not None:
            why = f"{refused[0]}; the merge noted its folds for whole weights"
            fix = "unmerge(model) before sharding, or forget(model) to keep the weights as they are"
            raise MergeError("the site can't be unmerged", where=path, why=why, fix=fix)
    folds = [
        (tensor_at(module, name), r, path) for path, module, site in merged_sites for name, r in _merged(site).folds
    ]
    verify_records([(tensor, record) for tensor, record, _ in folds], [path for *_, path in folds], check)
    live = state.rules_at([name for name, standing in state.standing.items() if standing.live])
    with torch.no_grad(), Journal() as journal:
        take_out_folds(journal, folds[::-1], check=check)
        for _, module, site in merged_sites:
            keep_site(journal, module)
            merged = _merged(site)
            for name, parameter in merged.tied.items():
                parameters = _owner(module, name)._parameters
                journal.keep(parameters)
                parameters[name.rpartition(".")[2]] = parameter
            site.merged = None
            install_live(module, journal, live=live.get(id(module)))
        journal.keep(state.__dict__)
        retie(root, state.untied, journal)
        state.untied = Untied()


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
        raise NotFiniteError(
            f"merging gives a {broken} that is not finite",
            where=path,
            why="an adapter's tensors hold NaN or infinity, or the sum overflows the base's dtype",
            fix="inspect adapter_state_dict(model, name), or merge in a wider dtype",
        )


def _changes(
    module: nn.Module, site: SiteState, chosen: list[Applied], folding: SiteFolding
) -> Iterator[dict[str, Change]]:
    """The changes of each rule at a site, in the order of the graph.

    Rules that replace a parameter act before rules that add to the output. Rules that change the input act on both, the
    last applied first.
    """
    own = own_forward(module, site.base) if len(chosen) > 1 else None  # a single rule needs no order
    replacing, adding, on_input = [], [], []
    for applied in chosen:
        replaced = layer_of(applied, module, site.path, own).tape.replaced_refs() if own is not None else ()
        kinds = {ref.kind for ref in replaced} or {"output"}
        (replacing if kinds <= {"state"} else on_input if kinds == {"input"} else adding).append(applied)
    for index, applied in enumerate(replacing + adding + on_input[::-1]):
        if index == len(replacing):
            folding.mark_base()
        live = LiveSite(module, site.path, applied.adapter, tensors_of(module, applied.adapter), folding.source)
        with HookCall(applied.rule, "merged", site.path):
            changes = dict(merged_tensors(applied.rule, live))
            for name, change in changes.items():
                if not isinstance(change, (LowRank, Rows, Tensor)):
                    raise TypeError(f"{name} is given a {type(change).__name__}, not a tensor, LowRank or Rows")
        if applied.weight != 1.0:
            changes = {
                name: scale_change(change, live.tensor(name), applied.weight) for name, change in changes.items()
            }
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
    path: str, module: nn.Module, site: SiteState, chosen: list[Applied], counted: list[Applied]
) -> list[SurgeryError]:
    """Why the chosen rules can't be merged at a site. `counted`: the chosen rules and the other live rules there."""
    problems: list[SurgeryError] = []
    refused = reason_against(module)
    if refused is not None:
        problems.append(MergeError("the site can't be merged", where=path, why=refused[0], fix=refused[1]))
    for name in dict.fromkeys(applied.adapter for applied in chosen):
        if (box := box_of(module, name)) is not None and without_values(box):
            why = "its tensors came from the meta device by to_empty"
            problems.append(
                MergeError(f"the adapter {name!r} has no values yet", where=path, why=why, fix="load them first")
            )
    for applied in chosen:
        rule = applied.rule
        if not rule.mergeable:
            why = rule.why_not_merged
            problems.append(MergeError(f"{rule.label} can't be merged", where=path, why=why, fix="keep it unmerged"))
    if len(chosen) < len(counted) and not all(applied.rule.additive for applied in counted):
        others = ", ".join(
            f"{a.rule.label} [{a.adapter}]" for a in counted if a.adapter not in {applied.adapter for applied in chosen}
        )
        why = f"{others} is on the same site, and its effect depends on the order"
        problems.append(
            MergeError(
                "part of a stack can't be merged here", where=path, why=why, fix="merge all adapters: merge(model)"
            )
        )
    if not problems and len(chosen) > 1:
        problem = find_live_conflict(chosen, module, site.path, own_forward(module, site.base))
        problems += [problem] if problem is not None else []
    if not problems:
        problems += _packed(path, module, site, chosen)
    return problems


def _packed(path: str, module: nn.Module, site: SiteState, chosen: list[Applied]) -> list[SurgeryError]:
    weight = module._parameters.get("weight")
    if weight is None or not (hasattr(weight, "device_mesh") or is_packed(weight)):
        return []
    why, fix = f"its weight is a {type(weight).__name__} of {weight.dtype}", "keep it unmerged"
    if is_packed(weight):
        why, fix = f"{why}: quantised, so a sum would be rounded away", f"keep it unmerged, or {UNPACKED}"
    return [MergeError(f"{chosen[0].rule.label} can't be merged here", where=path, why=why, fix=fix)]


def _already(path: str, site: SiteState) -> MergeError:
    adapters = ", ".join(_merged(site).adapters)
    return MergeError(
        "the model is merged already", where=path, why=f"its weights hold {adapters}", fix="unmerge(model) first"
    )


def _merged(site: SiteState) -> Merged:
    assert site.merged is not None
    return site.merged


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])
