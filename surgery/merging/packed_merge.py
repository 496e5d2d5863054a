"""Merges rules into a packed weight: into a plain Linear in its place, or into new codes and scales."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from surgery.arithmetic.corrections import checksum
from surgery.errors import MergeError, SurgeryError
from surgery.forward.parameter_view import find_tensor
from surgery.merging.merge_settings import MergeSettings
from surgery.merging.quantisation_marks import take_off_marks
from surgery.merging.site_folding import SiteFolding, check_foldable, fold_into
from surgery.merging.site_merge import NotFiniteError, changes_of_rules
from surgery.packed.packed_weight import PackedWeight, packed_weight_of
from surgery.packed.quantised_class import plain_class
from surgery.packed.requantising import choose_codes
from surgery.patterns.module_walk import base_modules
from surgery.state.packed_module import CodeRecord, PackedFold, become_plain
from surgery.state.parameter_owners import Owners
from surgery.state.record_undo import keep_site
from surgery.state.records import Applied, Merged, SiteState
from surgery.transaction.undo_log import Journal, Trial
from surgery.weaving.generated_class import swap_class

__all__ = ["dequantise_all", "merge_packed", "merged_dense", "plain_dtype", "unmerge_packed"]


def plain_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of most numbers in the model's own unquantised parameters, and so of its activations; None without."""
    counts: Counter[torch.dtype] = Counter()
    for _, module in base_modules(model):
        if packed_weight_of(module) is None:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.is_floating_point():
                    counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else None


def merge_packed(
    owners: Owners,
    path: str,
    module: nn.Module,
    site: SiteState,
    names: list[str],
    chosen: list[Applied],
    settings: MergeSettings,
    journal: Journal,
) -> MergeError | None:
    """Merge the chosen rules at a site with a packed weight. Returns the reason if requantising loses too much."""
    packed = packed_weight_of(module)
    assert packed is not None
    _check_own(owners, module, path)
    keep_site(journal, module)
    for applied in site.applied:
        journal.attribute(applied, "layer")
    fold = PackedFold(packed.layout, entries=math.prod(packed.shape), stored=packed.nbytes)
    dtype = settings.dtype or packed.dtype
    plain = become_plain(module, packed, torch.float64 if settings.dtype == torch.float64 else torch.float32)
    before, site.base = site.base, plain_class(module)
    swap_class(module, site.base)
    own = {name: tensor.detach().clone() for name, tensor in module._parameters.items() if tensor is not None}
    _fold(path, module, site, chosen)
    wanted = {name: tensor.detach() for name, tensor in module._parameters.items() if tensor is not None}
    if settings.safe and not all(bool(tensor.isfinite().all()) for tensor in wanted.values()):
        why = "an adapter's tensors hold NaN or infinity"
        raise NotFiniteError("merging gives values that are not finite", where=path, why=why)
    fold.norm = float((wanted["weight"] - own["weight"]).norm())
    merged = site.merged = Merged(tuple(names), packed=fold)
    if settings.quantised == "requantise":
        site.base = before
        plain.restore(module)
        swap_class(module, before)
        return _requantise(path, module, packed, own, wanted, merged, settings, journal)
    linear: Any = module
    for name, value in wanted.items():
        module._parameters[name] = nn.Parameter(_rounded(module, value, dtype, settings), own[name].requires_grad)
    fold.layout = str(dtype).removeprefix("torch.")
    fold.plain, fold.error = plain, float((linear.weight - wanted["weight"]).norm())
    fold.after = {name: checksum(tensor) for name, tensor in module._parameters.items() if tensor is not None}
    for applied in site.applied:
        if applied.adapter not in names:
            applied.layer = None  # recorded again, for the forward of a plain Linear
    return None


def dequantise_all(model: nn.Module, dtype: torch.dtype | None, journal: Journal) -> None:
    """Make all quantised modules plain Linears, until the journal undoes it."""
    dtype, plain = dtype or plain_dtype(model), list[str]()
    for path, module in list(base_modules(model)):
        packed = packed_weight_of(module)
        if packed is not None:
            journal.keep(module.__dict__)
            journal.undo(object.__setattr__, module, "__class__", type(module))
            become_plain(module, packed, dtype or packed.dtype)
            swap_class(module, plain_class(module))
            plain.append(path)
    take_off_marks(model, plain, None, journal)


def _rounded(module: nn.Module, value: Tensor, dtype: torch.dtype, settings: MergeSettings) -> Tensor:
    rounding = settings.rounding_of(module, nn.Linear, torch.empty_like(value, dtype=dtype, device="meta"))
    return value.to(dtype) if rounding is None else rounding.value(value, dtype)


def unmerge_packed(path: str, module: nn.Module, site: SiteState, merged: Merged, journal: Journal) -> None:
    """Put the packed weight back, and the class of the quantised module. The caller has noted the site."""
    fold = merged.packed
    assert fold is not None
    if fold.plain is not None:
        for applied in site.applied:
            journal.attribute(applied, "layer")
            if applied.adapter not in merged.adapters:
                applied.layer = None  # recorded again, for the forward of the quantised module
        fold.take_out(module, path)
        site.base = fold.plain.base
        swap_class(module, site.base)
        return
    packed = packed_weight_of(module)
    if packed is not None:
        journal.undo(packed.write, {name: tensor.detach().clone() for name, tensor in packed.tensors().items()})
    for name in fold.others:
        tensor = getattr(module, name)
        journal.undo(tensor.copy_, tensor.detach().clone())
    fold.take_out(module, path)


def merged_dense(
    path: str,
    packed: PackedWeight,
    site: SiteState | None,
    chosen: list[Applied],
    dtype: torch.dtype,
    settings: MergeSettings,
) -> dict[str, Tensor]:
    """The tensors of the plain Linear that a merge would put in the place of a quantised module, which stays."""
    module = packed.module
    with Trial() as trial:
        trial.keep(module.__dict__)
        trial.undo(object.__setattr__, module, "__class__", type(module))
        become_plain(module, packed, torch.float64 if dtype == torch.float64 else torch.float32)
        plain = plain_class(module)
        swap_class(module, plain)
        if site is not None and chosen:
            trial.attribute(site, "base")
            site.base = plain
            _fold(path, module, site, chosen)
        return {
            name: _rounded(module, tensor.detach(), dtype, settings)
            for name, tensor in module._parameters.items()
            if tensor is not None
        }


def _fold(path: str, module: nn.Module, site: SiteState, chosen: list[Applied]) -> None:
    """Add the changes of the rules to the tensors of the module, which is a plain Linear for now."""
    folding = SiteFolding(module, nn.Linear, path, MergeSettings("copy"), Journal())
    for _, changes in changes_of_rules(module, site, chosen, folding):
        for name, change in changes.items():
            check_foldable(_NO_OWNERS, module, name, change, path, True)
            folding.add(name, change)
    folding.finish()


def _requantise(
    path: str,
    module: nn.Module,
    packed: PackedWeight,
    own: dict[str, Tensor],
    wanted: dict[str, Tensor],
    merged: Merged,
    settings: MergeSettings,
    journal: Journal,
) -> MergeError | None:
    """Quantise the merged weight anew, and note how to get the old codes back."""
    fold, weight = merged.packed, wanted.pop("weight")
    assert fold is not None
    delta = weight - own["weight"]
    old = {name: tensor.detach().clone() for name, tensor in packed.tensors().items()}
    products = settings.products.get(id(module))
    if fold.norm:
        journal.undo(packed.write, old)
        try:
            codes = choose_codes(packed, weight, products)
        except (SurgeryError, NotImplementedError) as error:
            why = getattr(error, "why", None) or str(error)
            return MergeError("the weight can't be quantised anew", where=path, why=why, fix=_DEQUANTISE)
        fold.error = float((codes.values - weight).norm())
        if products is not None and len(products) == weight.shape[1]:
            outputs = float((delta @ products * delta).sum().clamp(min=0).sqrt())
            off = codes.values - weight
            lost = float((off @ products * off).sum().clamp(min=0).sqrt())
            fold.outputs = lost / outputs if outputs else None
    else:
        fold.error = 0.0
    now = packed.tensors()
    copies = settings.keep == "copy" or packed.rearranges
    fold.codes = {name: CodeRecord.of(tensor, now[name], copies) for name, tensor in old.items()}
    for name, value in wanted.items():
        if torch.equal(value, own[name]):
            continue
        target: Any = getattr(module, name)
        change = value.to(target.dtype)
        if find_tensor(module, name) is not None:
            merged.folds.append((name, fold_into(module, name, change, keep="record", where=path, journal=journal)))
            continue
        former = target.detach().clone()  # a plain attribute, as HQQ's bias
        journal.undo(target.copy_, former)
        target.copy_(change)
        fold.others[name] = CodeRecord.of(former, target, True)
    share = fold.error / fold.norm if fold.norm else 0.0
    if settings.limit is not None and not share <= settings.limit:
        outputs_lost = f", and {fold.outputs:.0%} of the change of the example's outputs" if fold.outputs else ""
        return MergeError(
            "quantising the merged weight loses too much of the adapter",
            where=path,
            why=f"{fold.layout} loses {share:.0%} of ‖ΔW‖{outputs_lost}; the limit is {settings.limit:.0%}",
            fix=f"{_DEQUANTISE}; or limit=None merges anyway",
        )
    return None


_DEQUANTISE = 'keep the adapter unmerged, or merge(model, quantised="dequantise")'
_NO_OWNERS: Any = type("_NoOwners", (), {"of": staticmethod(lambda parameter: [])})()


def _check_own(owners: Owners, module: nn.Module, path: str) -> None:
    weight = module._parameters.get("weight")
    if weight is not None and len(shared := owners.of(weight)) > 1:
        raise MergeError(
            "merging into this quantised weight would change another module",
            where=path,
            why=f"one weight serves {' and '.join(shared)}",
            fix="keep the adapter unmerged",
        )
