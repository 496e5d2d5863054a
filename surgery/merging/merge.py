"""`merge` and `unmerge`: fold rules with a closed form into the base's parameters, and take them out to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from surgery.errors import MergeError, PlanError, SurgeryWarning
from surgery.forward.parameter_view import tensor_at
from surgery.merging.merge_objections import already_merged, objections_to_merge
from surgery.merging.site_folding import Keep, fold_together, verify_records
from surgery.merging.site_merge import check_finite, merge_site, owner_of
from surgery.progress import Progress, each_step
from surgery.results import Report
from surgery.rewritten_model.verb_root import rewritten, with_lost
from surgery.sharded_tensors import sharding_of
from surgery.state.adapter_naming import adapter_names
from surgery.state.in_use import check_free
from surgery.state.merged_tensors import guard_merged, unguard_merged
from surgery.state.parameter_owners import Owners
from surgery.state.record_undo import keep_site, take_out_folds
from surgery.state.records import Merged, ModelState, Sites, SiteState, sites
from surgery.state.tied_weights import Untied, retie, say_untied
from surgery.transaction.neutral_context import verb
from surgery.transaction.undo_log import Journal
from surgery.weaving.site_class import install_live

__all__ = ["MergeReport", "merge", "unmerge"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class MergeReport(Report):
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

    def to_rows(self) -> list[dict[str, Any]]:
        """One row; `adapters` is a text."""
        return [{**self.to_dict(), "adapters": ", ".join(self.adapters)}]

    def __str__(self) -> str:
        per_entry = f", {self.nbytes / self.entries:.3f} bytes an entry" if self.entries else ""
        kept_bytes = f"keeps {self.nbytes:,} bytes to unmerge{per_entry}"
        return f"merged {', '.join(self.adapters)} at {self.sites} sites; {kept_bytes}"


@verb
def merge(
    model: nn.Module,
    adapter: str | Sequence[str] | None = None,
    *,
    keep: Keep = "record",
    untie: bool = False,
    safe: bool = False,
    progress: Progress = False,
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
        adapter: a name or several names. None: all live adapters but those with structural rules alone.
        keep: "record" keeps a small correction (see `surgery.arithmetic.exact_fold`), exact for any number of threads
            and any device. "copy" keeps the original weights, which is faster.
        untie: whether a site whose weight another module shares gets a weight of its own while merged. The config of a
            transformers model then says that nothing is tied, so `tie_weights` and checkpoints keep the weights apart.
        safe: whether results that are not finite raise before the model changes (PEFT's safe_merge).
        progress: True draws a bar on a terminal, with rich. A function is called with (what is done, steps done,
            steps in all). Default False.

    Returns:
        A `MergeReport`. If exactly these adapters are merged already, nothing happens, and a `SurgeryWarning` says so.

    Raises:
        PlanError: one `MergeError` for each site with a rule without a closed form, or with a packed or sharded weight.
        MergeError: a weight that another module shares, a result that is not finite, or the name of an adapter with
            structural rules alone.
        SurgeryError: an unknown adapter. In all cases the model is unchanged.

    PEFT: `merge_adapter`.
    """
    model, state = rewritten(model)
    names = adapter_names(state, adapter)
    check_free(model)
    structural = state.structural
    if adapter is None:
        names = [name for name in names if state.standing[name].live and name not in structural]
    elif wrong := [name for name in names if name in structural]:
        raise MergeError(
            f"the adapter {wrong[0]!r} can't be merged",
            why="it changes the model's structure, and not weights",
            fix="commit(model) makes it final; merge(model) without names merges the other adapters",
        )
    live = [name for name, status in state.standing.items() if status.live]  # idle adapters have no effect
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
        for problem in objections_to_merge(path, module, site, chosen_at[id(module)], all_at[id(module)])
    ]
    merged = [(path, module, site) for path, module, site in all_sites if site.merged is not None]
    if merged and all(set(_merged(site).adapters) == set(names) for _, _, site in merged):
        warning = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} merged already: nothing happens"
        warnings.warn(warning, SurgeryWarning, stacklevel=3)
        return _report(names, merged)
    problems += [already_merged(path, _merged(site)) for path, _, site in merged][:1]
    if problems:
        raise PlanError(problems)
    owners, waiting = Owners(model), list[Any]()
    with torch.no_grad():
        if safe:
            for path, module, site in chosen_sites:
                check_finite(owners, path, module, site, chosen_at[id(module)], untie)
        with Journal() as journal, each_step(chosen_sites, progress, f"merge {', '.join(names)}") as counted_sites:
            for path, module, site in counted_sites:
                merge_site(owners, path, module, site, names, chosen_at[id(module)], keep, untie, journal, waiting)
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
            if chosen_sites:
                guard_merged(model, journal)
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
    merged_sites = _merged_sites(root, state)
    if not merged_sites:
        warnings.warn("nothing is merged: nothing happens", SurgeryWarning, stacklevel=3)
    _unmerge(root, state, merged_sites, check)
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
    """Take the folds out of the weights, restore ties, and install the live rules again."""
    for path, module, site in merged_sites:
        if site.merged is not None and site.merged.folds and (refusal := sharding_of(module)) is not None:
            why = f"{refusal[0]}; the merge noted its folds for whole weights"
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
                parameters = owner_of(module, name)._parameters
                journal.keep(parameters)
                parameters[name.rpartition(".")[2]] = parameter
            site.merged = None
            install_live(module, journal, live=live.get(id(module)))
        journal.keep(state.__dict__)
        retie(root, state.untied, journal)
        unguard_merged(root, journal)
        state.untied = Untied()


def _merged(site: SiteState) -> Merged:
    assert site.merged is not None
    return site.merged
