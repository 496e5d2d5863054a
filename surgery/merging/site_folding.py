"""Folds changes into a module's parameters: checks of the parameters, and the sequence of folds at one site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.arithmetic import batched_folds
from surgery.arithmetic.batched_folds import checksums_of
from surgery.arithmetic.exact_fold import Change, LowRank, Record, fold, unfold
from surgery.arithmetic.rounding import Rounding
from surgery.complex_numbers import is_number
from surgery.errors import MergeError
from surgery.forward.parameter_view import find_tensor, tensor_at
from surgery.merging.merge_settings import MergeSettings
from surgery.packed.packed_parameters import UNPACKED, is_packed
from surgery.state.packed_module import without_bits
from surgery.state.parameter_owners import Owners
from surgery.state.record_undo import keep_fold
from surgery.transaction.undo_log import Journal

__all__ = ["Fold", "SiteFolding", "check_foldable", "fold_into", "fold_together", "verify_records"]

Fold = tuple[str, Record]


def check_foldable(
    owners: Owners, module: nn.Module, name: str, change: Change, where: str, untie: bool = False
) -> None:
    """Raise `MergeError` if a parameter can't be folded into: absent, packed, sharded, or shared by modules."""
    parameter = find_tensor(module, name)
    if parameter is None:
        raise MergeError(f"{type(module).__name__} has no tensor {name!r} to fold into", where=where)
    subclass = type(parameter) not in (nn.Parameter, Tensor)
    if subclass or (isinstance(change, LowRank) and not is_number(parameter)):
        kind = type(parameter).__name__ if subclass else parameter.dtype
        raise MergeError(
            f"a change can't be folded into the {name} of this {type(module).__name__}",
            where=where,
            why=f"it is a {kind}: packed, quantised or sharded",
            fix="keep the adapter unmerged" + (f", or {UNPACKED}" if is_packed(parameter) else ""),
        )
    if not untie and isinstance(parameter, nn.Parameter) and len(shared := owners.of(parameter)) > 1:
        raise MergeError(
            f"folding into this {name} would change another module",
            where=where,
            why=f"one parameter serves {' and '.join(shared)}",
            fix="merge(model, untie=True) gives the site a weight of its own while merged",
        )


def fold_into(
    module: nn.Module, name: str, change: Change, *, keep: Literal["record", "copy"], where: str, journal: Journal
) -> Record:
    """Fold one change into a tensor of a module, and return the record that takes it out."""
    tensor = tensor_at(module, name)
    if isinstance(change, Tensor) and change.shape != tensor.shape:
        raise MergeError(f"a new {name} has the shape {tuple(change.shape)}, not {tuple(tensor.shape)}", where=where)
    return fold(tensor, change, keep=keep, where=where, note=keep_fold(journal, tensor))


def verify_records(folds: Sequence[tuple[Tensor, Record]], where: str | Sequence[str], check: bool = True) -> None:
    """Raise `MergeError` if a tensor changed since its last fold, or is packed now. Changes nothing.

    `where`: the module's path, or a path for each fold. `check=False`: do not compare checksums.
    """
    paths = [where] * len(folds) if isinstance(where, str) else where
    last = {id(tensor): (tensor, record, path) for (tensor, record), path in zip(folds, paths, strict=True)}
    for tensor, _, path in last.values():
        if tensor.is_meta:
            raise without_bits(path)
    whole_tensors = (
        [tensor for tensor, _, _ in last.values() if type(tensor) in (nn.Parameter, Tensor)] if check else []
    )
    sums = {id(tensor): checksum for tensor, checksum in zip(whole_tensors, checksums_of(whole_tensors), strict=True)}
    for tensor, record, where in last.values():
        if is_packed(tensor) and tensor.dtype != record.dtype or type(tensor) not in (nn.Parameter, Tensor):
            raise MergeError(
                "the base's weight was quantised since a rule folded into it",
                where=where,
                why=f"it is a {type(tensor).__name__} now, and a fold can't be taken out of that",
                fix="load the base again",
            )
        if check and sums[id(tensor)] != record.after:
            raise MergeError(
                "the base's weight changed since a rule folded into it",
                where=where,
                why="it was trained, loaded, or converted to another dtype in between",
                fix="restore those bits, or pass check=False to subtract the change anyway",
            )


def fold_together(waiting: list[tuple[SiteFolding, str, LowRank]]) -> None:
    """Do the folds that `SiteFolding.finish_with` deferred, as one batch."""
    tensors = [folding.tensor(name) for folding, name, _ in waiting]
    folds = [
        batched_folds.Fold(tensor, change, folding.where, keep_fold(folding.journal, tensor))
        for tensor, (folding, _, change) in zip(tensors, waiting, strict=True)
    ]
    for (folding, name, _), record in zip(waiting, batched_folds.fold_all(folds), strict=True):
        folding.folds.append((name, record))
    waiting.clear()


class SiteFolding:
    """The folds of one site in order. Low-rank changes of consecutive rules are joined, so they round once."""

    def __init__(
        self,
        module: nn.Module,
        base: type[nn.Module],
        where: str,
        settings: MergeSettings,
        journal: Journal,
        dry: bool = False,
    ):
        self.module, self.base, self.where = module, base, where
        self.settings, self.journal = settings, journal
        self.folds: list[Fold] = []
        self._base = 0
        self._pending: dict[str, list[LowRank]] = {}
        self._trial: dict[str, Tensor] | None = {} if dry else None  # copies, used instead of the module's tensors

    def source(self, name: str, base: bool) -> Tensor:
        """A tensor as the present rule sees it, or (`base`) as it was before any rule added to it."""
        self._flush(name)
        records = [record for folded_name, record in self.folds[self._base :] if folded_name == name]
        tensor = self.tensor(name)
        if not base or not records:
            return tensor
        if records[0].kind == "copy":
            assert records[0].kept is not None
            return records[0].kept.to(tensor.device, copy=True)
        original = tensor.detach().clone()
        for record in reversed(records):
            unfold(original, record, where=self.where)
        return original

    def add(self, name: str, change: Change) -> None:
        if isinstance(change, LowRank) and change.groups == 1 and change.gain is None:
            self._pending.setdefault(name, []).append(change)
            return
        self._flush(name)
        self._fold(name, change)

    def mark_base(self) -> None:
        """The folds so far replaced the base's parameters; the following folds add to them."""
        self._base = len(self.finish())

    def finish(self) -> list[Fold]:
        for name in list(self._pending):
            self._flush(name)
        return self.folds

    def finish_with(self, waiting: list[tuple[SiteFolding, str, LowRank]]) -> list[Fold]:
        """As `finish`, but a single low-rank change is deferred to `fold_together`, which does those of all sites."""
        pending = [(name, change) for name, changes in self._pending.items() for change in changes]
        if self.folds or len(pending) != 1 or self.settings.keep != "record" or self._rounding(pending[0][0]):
            return self.finish()
        self._pending.clear()
        waiting.append((self, *pending[0]))
        return self.folds  # `fold_together` fills it

    def finite(self) -> str | None:
        """The first tensor that is not finite after the folds, or None."""
        self.finish()
        return next((name for name, _ in self.folds if not torch.isfinite(self.tensor(name)).all()), None)

    def tensor(self, name: str) -> Tensor:
        if self._trial is not None:
            if name not in self._trial:
                self._trial[name] = tensor_at(self.module, name).detach().clone()
            return self._trial[name]
        return tensor_at(self.module, name)

    def _flush(self, name: str) -> None:
        pending = self._pending.pop(name, None)
        if pending:
            self._fold(name, LowRank.join(pending) if len(pending) > 1 else pending[0])

    def _fold(self, name: str, change: Any) -> None:
        tensor = self.tensor(name)
        if isinstance(change, Tensor) and change.shape != tensor.shape:
            raise MergeError(
                f"a merged {name} has the shape {tuple(change.shape)}, not {tuple(tensor.shape)}", where=self.where
            )
        note = keep_fold(self.journal, tensor)
        rounding = self._rounding(name)
        record = fold(tensor, change, keep=self.settings.keep, where=self.where, note=note, rounding=rounding)
        self.folds.append((name, record))

    def _rounding(self, name: str) -> Rounding | None:
        return self.settings.rounding_of(self.module, self.base, self.tensor(name))
