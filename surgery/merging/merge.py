"""`merge` and `unmerge`: fold rules with a closed form into the base's parameters, and take them out to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from surgery.arithmetic.rounding import RoundingMode
from surgery.errors import MergeError, PlanError, SurgeryError, SurgeryWarning
from surgery.forward.offloaded_weights import weights_present
from surgery.forward.parameter_view import tensor_at
from surgery.merging.example_effect import run_examples
from surgery.merging.merge_report import MergeLoss, MergeReport, TensorLoss, tensor_losses, warn_of_losses
from surgery.merging.merge_settings import Keep, MergeSettings, Quantised
from surgery.merging.merge_sites import choose_sites, record_of
from surgery.merging.offloaded_merge import merge_offloaded_site, unmerge_offloaded_site
from surgery.merging.packed_merge import merge_packed, plain_dtype, unmerge_packed
from surgery.merging.quantisation_marks import restore_marks, take_off_marks
from surgery.merging.site_folding import fold_together, verify_records
from surgery.merging.site_merge import check_finite, merge_site, owner_of
from surgery.packed.packed_map import packed_by_name
from surgery.patterns.offload_hooks import is_offloaded
from surgery.progress import Progress, each_step
from surgery.rewritten_model.verb_root import rewritten, with_lost
from surgery.sharded_tensors import sharding_of
from surgery.state.in_use import check_free
from surgery.state.merged_tensors import guard_merged, unguard_merged
from surgery.state.parameter_owners import Owners
from surgery.state.record_undo import keep_site, take_out_folds
from surgery.state.records import ModelState, Sites, SiteState
from surgery.state.tied_weights import Untied, retie, say_untied
from surgery.transaction.neutral_context import verb
from surgery.transaction.undo_log import Journal
from surgery.weaving.site_class import install_live

__all__ = ["MergeLoss", "MergeReport", "TensorLoss", "merge", "unmerge"]

M = TypeVar("M", bound=nn.Module)


@verb
def merge(
    model: nn.Module,
    adapter: str | Sequence[str] | None = None,
    *,
    keep: Keep = "record",
    untie: bool = False,
    safe: bool = False,
    rounding: RoundingMode = "nearest",
    generator: torch.Generator | None = None,
    quantised: Quantised = "refuse",
    dtype: torch.dtype | None = None,
    limit: float | None = 0.10,
    example_inputs: Any = None,
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
        rounding: how sums are rounded to float16 and bfloat16. "nearest" loses changes that are small beside the
            weight. "stochastic" rounds up or down by chance, so that the mean is right. "error-feedback" takes the
            error of each entry out of the next ones of its row; with `example_inputs` it weighs them by the site's
            inputs, as GPTQ does. `unmerge` is exact in every case.
        generator: draws the numbers of stochastic rounding. None: torch's default generator.
        quantised: what happens to quantised weights. "refuse" (default): an error names the sites. "dequantise": the
            module is a plain `nn.Linear` while merged (packed experts: the experts of the model's architecture), and
            `unmerge` gives the quantised module back to the bit.
            "requantise": the merged weight gets new codes and scales, and `unmerge` restores the old ones to the bit.
            With `example_inputs`, codes are chosen by error feedback, as GPTQ does.
        dtype: the dtype of these plain modules. None: that of the model's other parameters. In a model without others:
            that of the dequantised weight, and if this is half precision, Linears compute in the dtype of their input.
        limit: the share of ‖ΔW‖ that requantising may lose at a site; more is an error. None: any share.
        example_inputs: inputs of a call, as for `apply_rules`; a list holds several. The report then says how the
            outputs of the live and the merged model differ.
        progress: True draws a bar on a terminal, with rich. A function is called with (what is done, steps done,
            steps in all). Default False.

    Returns:
        A `MergeReport`. Its `loss` says how much of the change rounding swallowed. If exactly these adapters are merged
        already, nothing happens, and a `SurgeryWarning` says so.
    Raises:
        PlanError: one `MergeError` for each site with a rule without a closed form, or with a packed or sharded weight.
        MergeError: a weight that another module shares, a result that is not finite, or the name of an adapter with
            structural rules alone.
        SurgeryError: an unknown adapter. In all cases the model is unchanged.

    Warns:
        SurgeryWarning: rounding swallowed more than 10 % of the change of a weight.

    PEFT: `merge_adapter`.
    """
    settings = MergeSettings(keep, untie, rounding, generator, safe, quantised, dtype, limit)
    model, state = rewritten(model)
    check_free(model)
    chosen_merge = choose_sites(model, state, adapter, quantised)
    names, chosen_sites = chosen_merge.names, chosen_merge.sites
    chosen_at, all_at, problems = chosen_merge.rules, chosen_merge.counted, list[SurgeryError]()
    if chosen_merge.merged:
        warning = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} merged already: nothing happens"
        warnings.warn(warning, SurgeryWarning, stacklevel=3)
        return _report(names, chosen_merge.merged)
    owners, waiting, config = Owners(model), list[Any](), getattr(model, "config", None)
    live_outputs = None
    packed_sites = (
        [] if quantised == "refuse" else [m for _, m, _ in chosen_sites if packed_by_name(m) and not is_offloaded(m)]
    )
    packed_ids = set(map(id, packed_sites))
    if packed_sites and quantised == "dequantise":
        settings = replace(settings, dtype=dtype or plain_dtype(model))
    if example_inputs is not None:
        watched = packed_sites if quantised == "requantise" else []
        watched = [module for _, module, _ in chosen_sites] if rounding == "error-feedback" else watched
        live_outputs = run_examples(model, example_inputs, watched)
        settings = replace(settings, products=live_outputs.products)
    with torch.no_grad():
        if safe:
            for path, module, site in chosen_sites:
                if id(module) in packed_ids:
                    continue
                with weights_present(module):
                    check_finite(owners, path, module, site, chosen_at[id(module)], untie)
        with Journal() as journal, each_step(chosen_sites, progress, f"merge {', '.join(names)}") as counted_sites:
            for path, module, site in counted_sites:
                chosen = chosen_at[id(module)]
                if is_offloaded(module):
                    merge_offloaded_site(owners, path, module, site, names, chosen, settings, journal)
                elif id(module) in packed_ids:
                    problem = merge_packed(owners, path, module, site, names, chosen, settings, journal, config)
                    problems += [problem] if problem is not None else []
                else:
                    merge_site(owners, path, module, site, names, chosen, settings, journal, waiting)
                staying = [
                    rule_record
                    for rule_record in all_at[id(module)]
                    if rule_record.live and rule_record.adapter not in names
                ]
                install_live(module, journal, live=staying)
            fold_together(waiting)
            if problems:
                raise PlanError(problems)
            if packed_sites and quantised == "dequantise":
                journal.keep(state.__dict__, state.unquantised)
                plain = [path for path, module, _ in chosen_sites if id(module) in packed_ids]
                take_off_marks(model, plain, state, journal)
            if any(record_of(site).tied for _, _, site in chosen_sites):
                journal.keep(state.__dict__)
                state.untied = say_untied(model, journal)
            if chosen_sites:
                guard_merged(model, journal)
            report = _report(names, chosen_sites)
            if live_outputs is not None:
                merged_outputs = run_examples(model, example_inputs)
                difference, kl = live_outputs.difference(merged_outputs), live_outputs.kl(merged_outputs)
                report = replace(report, loss=replace(report.loss, difference=difference, kl=kl))
    if rounding == "nearest":
        warn_of_losses(report.loss, stacklevel=3)
    return report


def _report(names: Sequence[str], merged_sites: Sequence[tuple[str, nn.Module, SiteState]]) -> MergeReport:
    folds = [
        (tensor_at(module, name), record) for _, module, site in merged_sites for name, record in record_of(site).folds
    ]
    entries = {id(tensor): tensor.numel() for tensor, _ in folds}
    losses = [loss for path, _, site in merged_sites for loss in tensor_losses(path, record_of(site))]
    packed = [fold for _, _, site in merged_sites if (fold := record_of(site).packed) is not None]
    nbytes = sum(record.nbytes for _, record in folds) + sum(fold.nbytes for fold in packed)
    count = sum(entries.values()) + sum(fold.entries for fold in packed)
    return MergeReport(tuple(names), len(merged_sites), nbytes, count, MergeLoss(tuple(losses)))


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
    offloaded = [(path, module, record_of(site).folds) for path, module, site in merged_sites if is_offloaded(module)]
    folds = [
        (tensor_at(module, name), r, path)
        for path, module, site in merged_sites
        if not is_offloaded(module)
        for name, r in record_of(site).folds
    ]
    for path, module, kept_folds in offloaded:
        with weights_present(module):
            verify_records([(tensor_at(module, name), record) for name, record in kept_folds], path, check)
    verify_records([(tensor, record) for tensor, record, _ in folds], [path for *_, path in folds], check)
    packed = [
        (path, module, fold) for path, module, site in merged_sites if (fold := record_of(site).packed) is not None
    ]
    for path, module, fold in packed if check else ():
        fold.check(module, path)
    live = state.rules_at([name for name, standing in state.standing.items() if standing.live])
    with torch.no_grad(), Journal() as journal:
        take_out_folds(journal, folds[::-1], check=check)
        for path, module, kept_folds in offloaded[::-1]:
            unmerge_offloaded_site(module, path, kept_folds, check, journal)
        for path, module, site in merged_sites:
            keep_site(journal, module)
            merged = record_of(site)
            if merged.packed is not None:
                unmerge_packed(path, module, site, merged, journal)
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
        restore_marks(state, journal)
