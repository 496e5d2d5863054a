"""Merges rules into packed weights: into a plain module in their place, or into new codes and scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.arithmetic.corrections import checksum
from surgery.arithmetic.rounding import HALF
from surgery.errors import MergeError, SurgeryError
from surgery.forward.parameter_view import find_tensor
from surgery.merging.merge_settings import MergeSettings
from surgery.merging.quantisation_marks import take_off_marks
from surgery.merging.site_folding import SiteFolding, check_foldable, fold_into
from surgery.merging.site_merge import NotFiniteError, changes_of_rules
from surgery.packed.packed_map import packed_by_name, stored_in
from surgery.packed.packed_tensors import PackedTensors
from surgery.packed.requantising import choose_codes
from surgery.patterns.module_walk import base_modules
from surgery.state.kept_codes import CodeRecord, KeptCodes, keep_bits
from surgery.state.packed_module import ChangeLoss, PackedFold, become_plain
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
        if not packed_by_name(module):
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
    config: Any = None,
) -> MergeError | None:
    """Merge the chosen rules at a site with packed weights. Returns the reason if requantising loses too much.

    `config`: the model's configuration.
    """
    packed = packed_by_name(module)
    first = next(iter(packed.values()))
    _check_own(owners, module, path)
    keep_site(journal, module)
    for applied in site.applied:
        journal.attribute(applied, "layer")
    fold = PackedFold(first.layout, stored=sum(part.nbytes for part in packed.values()))
    dtype = settings.dtype or first.dtype
    unknown = settings.dtype is None and dtype in HALF  # of activations: they may be in float32
    wide = torch.float64 if settings.dtype == torch.float64 else torch.float32
    plain = become_plain(module, wide, in_any_dtype=unknown, config=config)
    before, site.base = site.base, plain.plain
    swap_class(module, site.base)
    own = {name: tensor.detach().clone() for name, tensor in module._parameters.items() if tensor is not None}
    _fold(path, module, site, chosen)
    wanted = {name: tensor.detach() for name, tensor in module._parameters.items() if tensor is not None}
    if settings.safe and not all(bool(tensor.isfinite().all()) for tensor in wanted.values()):
        why = "an adapter's tensors hold NaN or infinity"
        raise NotFiniteError("merging gives values that are not finite", where=path, why=why)
    norms = {name: float((wanted[name] - own[name]).norm()) for name in packed}
    fold.entries = sum(own[name].numel() for name in packed)
    merged = site.merged = Merged(tuple(names), packed=fold)
    if settings.quantised == "requantise":
        site.base = before
        plain.restore(module)
        swap_class(module, before)
        return _requantise(path, module, packed, own, wanted, norms, merged, settings, journal)
    for name in [name for name in own if name in plain.tensors]:
        trains = module._parameters[name].requires_grad  # type: ignore[union-attr]
        rounded = _rounded(module, wanted[name], dtype, settings)
        module._parameters[name] = nn.Parameter(rounded, trains)
        if name in packed:
            fold.losses[name] = ChangeLoss(norms[name], float((rounded - wanted[name]).norm()))
    fold.layout, fold.plain = str(dtype).removeprefix("torch."), plain
    fold.after = {name: checksum(module._parameters[name]) for name in own if name in plain.tensors}  # type: ignore[arg-type]
    for applied in site.applied:
        if applied.adapter not in names:
            applied.layer = None  # recorded again, for the forward of a plain Linear
    return None


def dequantise_all(model: nn.Module, dtype: torch.dtype | None, journal: Journal) -> None:
    """Make all quantised modules plain, until the journal undoes it."""
    dtype, plain = dtype or plain_dtype(model), list[str]()
    for path, module in list(base_modules(model)):
        if packed := packed_by_name(module):
            journal.keep(module.__dict__)
            journal.undo(object.__setattr__, module, "__class__", type(module))
            wanted = dtype or next(iter(packed.values())).dtype
            swap_class(module, become_plain(module, wanted, config=getattr(model, "config", None)).plain)
            plain.append(path)
    take_off_marks(model, plain, None, journal)


def _rounded(module: nn.Module, value: Tensor, dtype: torch.dtype, settings: MergeSettings) -> Tensor:
    base = getattr(type(module), "_surgery_base", type(module))
    rounding = settings.rounding_of(module, base, torch.empty_like(value, dtype=dtype, device="meta"))
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
        site.base = fold.plain.base
        fold.take_out(module, journal, path)
        swap_class(module, site.base)
        return
    fold.take_out(module, journal, path)


def merged_dense(
    path: str,
    module: nn.Module,
    site: SiteState | None,
    chosen: list[Applied],
    dtype: torch.dtype | None,
    settings: MergeSettings,
) -> dict[str, Tensor]:
    """The tensors of the plain module that a merge would put in the place of a quantised module, which stays."""
    dtype = dtype or next(iter(packed_by_name(module).values())).dtype
    with Trial() as trial:
        trial.keep(module.__dict__)
        trial.undo(object.__setattr__, module, "__class__", type(module))
        plain = become_plain(module, torch.float64 if dtype == torch.float64 else torch.float32)
        swap_class(module, plain.plain)
        if site is not None and chosen:
            trial.attribute(site, "base")
            site.base = plain.plain
            _fold(path, module, site, chosen)
        return {
            name: _rounded(module, tensor.detach(), dtype, settings) if name in plain.tensors else tensor.detach()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None and name not in module._non_persistent_buffers_set
        }


def _fold(path: str, module: nn.Module, site: SiteState, chosen: list[Applied]) -> None:
    """Add the changes of the rules to the tensors of the module, which is plain for now."""
    folding = SiteFolding(module, site.base, path, MergeSettings(), Journal())  # sums as those of plain weights
    for _, changes in changes_of_rules(module, site, chosen, folding):
        for name, change in changes.items():
            check_foldable(_NO_OWNERS, module, name, change, path, True)
            folding.add(name, change)
    folding.finish()


def _requantise(
    path: str,
    module: nn.Module,
    packed: Mapping[str, PackedTensors],
    own: dict[str, Tensor],
    wanted: dict[str, Tensor],
    norms: dict[str, float],
    merged: Merged,
    settings: MergeSettings,
    journal: Journal,
) -> MergeError | None:
    """Quantise the merged weights anew, and note how to get the old codes back."""
    fold = merged.packed
    assert fold is not None
    old = keep_bits(module, journal)
    for name, part in packed.items():
        weight = wanted.pop(name)
        fold.losses[name] = ChangeLoss(norms[name], 0.0)
        if norms[name]:
            try:
                products = settings.products.get(id(module)) if weight.dim() == 2 else None
                codes = choose_codes(part, weight, products)
            except (SurgeryError, NotImplementedError) as error:
                why = getattr(error, "why", None) or str(error)
                return MergeError(f"the {name} can't be quantised anew", where=path, why=why, fix=_DEQUANTISE)
            fold.losses[name] = _loss(codes.values - weight, weight - own[name], products)
    fold.codes = KeptCodes.of(old, module, settings.keep == "copy")
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
    share = fold.share
    if settings.limit is not None and not share <= settings.limit:
        outputs = next(iter(fold.losses.values())).outputs
        outputs_lost = f", and {outputs:.0%} of the change of the example's outputs" if outputs else ""
        return MergeError(
            "quantising the merged weight loses too much of the adapter",
            where=path,
            why=f"{fold.layout} loses {share:.0%} of ‖ΔW‖{outputs_lost}; the limit is {settings.limit:.0%}",
            fix=f"{_DEQUANTISE}; or limit=None merges anyway",
        )
    return None


def _loss(off: Tensor, delta: Tensor, products: Tensor | None) -> ChangeLoss:
    """What is lost of a change: by its numbers, and with H = XᵀX of the inputs X by its outputs."""
    share = None
    if products is not None and len(products) == delta.shape[1]:
        lost, outputs = (float((part @ products * part).sum().clamp(min=0).sqrt()) for part in (off, delta))
        share = lost / outputs if outputs else None
    return ChangeLoss(float(delta.norm()), float(off.norm()), share)


_DEQUANTISE = 'keep the adapter unmerged, or merge(model, quantised="dequantise")'
_NO_OWNERS: Any = type("_NoOwners", (), {"of": staticmethod(lambda parameter: [])})()


def _check_own(owners: Owners, module: nn.Module, path: str) -> None:
    parts = (module._parameters.get(name) for name in ("weight", *stored_in(module)))
    shared = next((names for part in parts if part is not None and len(names := owners.of(part)) > 1), None)
    if shared is not None:
        raise MergeError(
            "merging into this quantised weight would change another module",
            where=path,
            why=f"one weight serves {' and '.join(shared)}",
            fix="keep the adapter unmerged",
        )
