"""Merges at modules whose weights accelerate offloads: one module's weights come in, are folded, and go back.

The undo log of a merge holds no weights of such modules, so a merge needs the memory of one module and of the records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.arithmetic.exact_fold import Change, Record, checksum, refold, unfold
from surgery.errors import MergeError
from surgery.forward.offloaded_weights import keep_value, keys_that_share, weights_present
from surgery.forward.parameter_view import tensor_at
from surgery.merging.merge_settings import MergeSettings
from surgery.merging.site_folding import Fold, check_foldable, fold_into, fold_together
from surgery.merging.site_merge import merge_site
from surgery.state.parameter_owners import Owners
from surgery.state.record_undo import keep_site
from surgery.state.records import Applied, SiteState
from surgery.transaction.undo_log import Journal

__all__ = ["check_unshared", "fold_offloaded", "merge_offloaded_site", "unmerge_offloaded_site"]


def merge_offloaded_site(
    owners: Owners,
    path: str,
    module: nn.Module,
    site: SiteState,
    names: list[str],
    chosen: list[Applied],
    settings: MergeSettings,
    journal: Journal,
) -> None:
    """As `merge_site`, for an offloaded module. The new weights go where accelerate keeps the old ones."""
    keep_site(journal, module)
    waiting: list[Any] = []
    absent = dict(module.named_parameters())
    with weights_present(module):
        merge_site(owners, path, module, site, names, chosen, settings, Journal(), waiting)
        fold_together(waiting)
        assert site.merged is not None
        site.merged.tied.clear()  # the store has a value for each module
        if not settings.untie:
            check_unshared(owners, module, absent, [name for name, _ in site.merged.folds], path)
        _keep(module, site.merged.folds, journal)


def fold_offloaded(
    owners: Owners, module: nn.Module, changes: Mapping[str, Change], path: str, journal: Journal
) -> list[Fold]:
    """Fold changes into the weights of an offloaded module, as a rule's start asks for."""
    absent = dict(module.named_parameters())
    with torch.no_grad(), weights_present(module):
        folds: list[Fold] = []
        for name, change in changes.items():
            check_foldable(owners, module, name, change, path)
            folds.append((name, fold_into(module, name, change, keep="record", where=path, journal=Journal())))
        check_unshared(owners, module, absent, [name for name, _ in folds], path)
        _keep(module, folds, journal)
    return folds


def check_unshared(
    owners: Owners, module: nn.Module, absent: Mapping[str, Tensor], names: Iterable[str], path: str
) -> None:
    """Raise `MergeError` if a tensor serves another module, too. `absent`: the module's tensors between calls."""
    for name in dict.fromkeys(names):
        shared = owners.of(absent[name])[1:] if name in absent else []
        if others := [*shared, *keys_that_share(module, name)]:
            raise MergeError(
                f"folding into this {name} would change another module",
                where=path,
                why=f"one tensor serves it and {' and '.join(others)}",
                fix="merge(model, untie=True) gives the site a weight of its own while merged",
            )


def _keep(module: nn.Module, folds: Sequence[Fold], journal: Journal) -> None:
    """Put the folded weights where accelerate keeps them."""
    journal.undo(_take_out, module, list(folds))
    for name in dict.fromkeys(name for name, _ in folds):
        keep_value(module, name, tensor_at(module, name))


def unmerge_offloaded_site(module: nn.Module, path: str, folds: Sequence[Fold], check: bool, journal: Journal) -> None:
    """Take the folds out of the weights where accelerate keeps them. `verify_records` ran before."""
    names = dict.fromkeys(name for name, _ in folds)
    with torch.no_grad(), weights_present(module):
        bits = {
            name: tensor_at(module, name).detach().clone()
            for name in names
            if not check or any(record.kind != "record" for folded, record in folds if folded == name)
        }
        journal.undo(_put_in, module, list(folds), bits, [dict(record.__dict__) for _, record in folds])
        for name, record in reversed(folds):
            unfold(tensor_at(module, name), record, check=check, where=path, verified=check)
        for name in names:
            keep_value(module, name, tensor_at(module, name))


def _take_out(module: nn.Module, folds: list[Fold]) -> None:
    """Undo the folds of a merge. Each may be unwritten or already undone."""
    with torch.no_grad(), weights_present(module):
        for name, record in reversed(folds):
            weight = tensor_at(module, name)
            if checksum(weight) == record.after and not (record.kind == "copy" and record.kept is None):
                unfold(weight, record, check=False)
                keep_value(module, name, weight)


def _put_in(module: nn.Module, folds: list[Fold], bits: dict[str, Tensor], fields: list[dict[str, Any]]) -> None:
    """Undo an unmerge: the weights of the merge, from their bits or by arithmetic."""
    for (_, record), earlier in zip(folds, fields, strict=True):
        record.__dict__.update(earlier)
    with torch.no_grad(), weights_present(module):
        for name in dict.fromkeys(name for name, _ in folds):
            weight = tensor_at(module, name)
            if name in bits:
                weight.copy_(bits[name])
            else:
                for record in _records(folds, name):
                    refold(weight, record)
            keep_value(module, name, weight)


def _records(folds: Sequence[Fold], name: str) -> list[Record]:
    return [record for folded, record in folds if folded == name]
