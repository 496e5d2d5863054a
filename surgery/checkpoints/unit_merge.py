"""Merges the rules of sites that share tensors, on tensors that are read when a rule asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from surgery.arithmetic.exact_fold import Change, Record, fold_for_good
from surgery.errors import MergeError
from surgery.merging.merge_settings import MergeSettings
from surgery.merging.site_folding import SiteFolding, check_foldable
from surgery.merging.site_merge import changes_of_rules
from surgery.state.parameter_owners import Owners
from surgery.state.records import Applied, SiteState
from surgery.transaction.undo_log import Journal

__all__ = ["MergeSite", "TensorStore", "changed_names", "merge_into"]


@dataclass(eq=False)
class MergeSite:
    """A site with the rules to merge there. `aliases`: for names that the files do not have, those that they have."""

    path: str
    module: nn.Module
    state: SiteState
    chosen: list[Applied]
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def started(self) -> list[tuple[str, Record]]:
        """The changes of the base's tensors by the start of the rules, by the site's own names.

        No quantised base is merged in files, so no change is one of codes.
        """
        changes = [change for applied in self.chosen for change in applied.changed]
        return [(name, record) for name, record in changes if isinstance(record, Record)]

    def name(self, tensor: str) -> str:
        """The name in the model of one of the site's tensors."""
        name = f"{self.path}.{tensor}" if self.path else tensor
        return self.aliases.get(name, name)


@dataclass
class TensorStore:
    """Tensors by name in the model, each read when it is first asked for. `folds`: records, in their order."""

    read: Callable[[str], Tensor]
    values: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, None] = field(default_factory=dict)
    folds: list[tuple[str, Record]] = field(default_factory=list)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.values:
            self.values[name] = self.read(name)
        return self.values[name]


class _StoreFolding(SiteFolding):
    """The folds of a site into the tensors of a store. `record`: keep what takes them out again."""

    def __init__(self, site: MergeSite, store: TensorStore, record: bool):
        super().__init__(site.module, site.state.base, site.path, MergeSettings(), Journal())
        self.site, self.store, self.recorded = site, store, record
        self._originals: dict[str, Tensor] = {}
        self._several = len(site.chosen) > 1

    def tensor(self, name: str) -> Tensor:
        return self.store[self.site.name(name)]

    def source(self, name: str, base: bool) -> Tensor:
        if self.recorded:
            return super().source(name, base)
        self._flush(name)
        return self._originals.get(name, self.tensor(name)) if base else self.tensor(name)

    def mark_base(self) -> None:
        super().mark_base()
        self._originals.clear()

    def _fold(self, name: str, change: Change) -> None:
        key = self.site.name(name)
        if self.recorded:
            super()._fold(name, change)
            self.store.folds.append((key, self.folds[-1][1]))
        else:
            tensor = self.tensor(name)
            if isinstance(change, Tensor) and change.shape != tensor.shape:
                shapes = f"{tuple(change.shape)}, not {tuple(tensor.shape)}"
                raise MergeError(f"a merged {name} has the shape {shapes}", where=self.where)
            if self._several and name not in self._originals:
                self._originals[name] = tensor.clone()
            self.store.values[key] = fold_for_good(tensor, change, self.where)
        self.store.changed[key] = None


def merge_into(store: TensorStore, site: MergeSite, owners: Owners, untie: bool, record: bool) -> None:
    """Merge the rules of a site into the tensors of a store."""
    folding = _StoreFolding(site, store, record)
    with torch.no_grad():
        for _, changes in changes_of_rules(site.module, site.state, site.chosen, folding):
            for name, change in changes.items():
                check_foldable(owners, site.module, name, change, site.path, untie)
                folding.add(name, change)
        folding.finish()


def changed_names(site: MergeSite, read: Callable[[str], Tensor]) -> dict[str, Change]:
    """Returns the changes at a site by the site's own names of tensors, without folding the last of them."""
    store, found = TensorStore(read), dict[str, Change]()
    folding = _StoreFolding(site, store, record=False)
    with torch.no_grad():
        for _, changes in changes_of_rules(site.module, site.state, site.chosen, folding):
            for name, change in changes.items():
                found[name] = change
                folding.add(name, change)
    return found
