"""`synced`: the tensors of the merged model by name, one after another, for an inference engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery.arithmetic.exact_fold import Change, folded_value
from surgery.arithmetic.rounding import RoundingMode
from surgery.errors import MergeError, SurgeryError
from surgery.forward.offloaded_weights import keys_that_share, value_at, weights_present
from surgery.forward.parameter_view import tensor_at
from surgery.merging.merge_settings import MergeSettings, Quantised
from surgery.merging.merge_sites import MergeSites, choose_sites
from surgery.merging.offloaded_merge import check_unshared
from surgery.merging.packed_merge import merged_dense, plain_dtype
from surgery.merging.site_folding import SiteFolding, check_foldable
from surgery.merging.site_merge import changes_of_rules
from surgery.packed.packed_map import packed_by_name
from surgery.patterns.module_walk import base_modules, every_path
from surgery.patterns.offload_hooks import is_offloaded
from surgery.rewritten_model.state_dict import base_state_dict
from surgery.rewritten_model.verb_root import rewritten
from surgery.state.in_use import check_free, claim
from surgery.state.parameter_owners import Owners
from surgery.state.records import Applied, SiteState
from surgery.transaction.neutral_context import neutral
from surgery.transaction.undo_log import Journal

__all__ = ["synced"]


@contextmanager
def synced(
    model: nn.Module,
    adapter: str | Sequence[str] | None = None,
    *,
    untie: bool = False,
    rounding: RoundingMode = "nearest",
    generator: torch.Generator | None = None,
    quantised: Quantised = "refuse",
    dtype: torch.dtype | None = None,
) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Give the tensors of the merged model by name, to load them into an inference engine between training steps.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, synced
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2, init="random"))
    >>> engine, x = nn.Sequential(nn.Linear(8, 8)), torch.ones(1, 8)
    >>> with synced(model) as tensors:
    ...     _ = engine.load_state_dict(dict(tensors))
    >>> torch.allclose(engine(x), model(x), atol=1e-6)
    True

    The tensors have the names, the order and the bits of `base_state_dict` after `merge`. The model itself is not
    changed: no weight is written, so its bits, gradients and optimisers stay, also after an error. Each merged tensor
    is computed when it is asked for and is not kept, so memory for one site is enough.

    Args:
        model: the model.
        adapter: a name or several names. None: all live adapters.
        untie: as for `merge`.
        rounding: as for `merge`.
        generator: as for `merge`.
        quantised: "refuse" (default): an error for quantised sites. "dequantise": all quantised modules give their
            dequantised weight, with the change, under the names of plain Linears.
        dtype: the dtype of dequantised weights. None: that of the model's other parameters.

    Yields:
        An iterator of (name, tensor) that ends with the block. A tensor without a change is the model's own memory:
        copy what is to outlive the next training step.

    Raises:
        PlanError: as for `merge`.
        MergeError: quantised="requantise", whose names depend on the backend.
        SurgeryError: the iterator is used after the block, or adapters were merged, unmerged or removed in between.
    """
    settings = MergeSettings("copy", untie, rounding, generator, False, quantised, dtype)
    if quantised == "requantise":
        fix = 'synced(model, quantised="dequantise"), or merge(model, quantised="requantise")'
        raise MergeError("synced does not give codes and scales", why="their names depend on the backend", fix=fix)
    root, state = rewritten(model)
    check_free(root)
    with neutral(root):
        chosen = choose_sites(root, state, adapter, quantised)
        tensors = _Tensors(root, chosen, settings)
    with claim(root):
        try:
            yield tensors
        finally:
            tensors.closed = True


class _Tensors(Iterator[tuple[str, Tensor]]):
    """The tensors of a merged model, computed one site after another."""

    def __init__(self, root: nn.Module, chosen: MergeSites, settings: MergeSettings):
        self.root, self.chosen, self.settings, self.closed = root, chosen, settings, False
        self._owners = Owners(root)
        self._sites = {path: (module, site) for path, module, site in ([] if chosen.merged else chosen.sites)}
        self._dense = plain_dtype(root) if settings.dtype is None else settings.dtype
        self._packed: dict[str, nn.Module] = {}
        if settings.quantised == "dequantise":
            self._packed = {path: module for path, module in base_modules(root) if packed_by_name(module)}
        self._modules = dict(every_path(root))
        # The first path of each module that has several, by all its paths. What they share is computed once and kept.
        paths: dict[int, list[str]] = {}
        for path, module in self._modules.items():
            paths.setdefault(id(module), []).append(path)
        self._first = {path: names[0] for names in paths.values() if len(names) > 1 for path in names}
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._values: dict[str, Tensor] = {}
        self._computed: set[str] = set()
        for path, (module, site) in self._sites.items():  # a shared weight is refused before the first tensor
            if _is_shared(self._owners, module):
                _Folding(path, module, site, settings, {}).run(self._owners, chosen.rules[id(module)])
        self._start, self._items = self._adapters(), self._run()

    def __next__(self) -> tuple[str, Tensor]:
        if self.closed:
            why, fix = "the tensors are computed from the model as it was there", "use them inside the block"
            raise SurgeryError("the block of synced has ended", why=why, fix=fix)
        now = self._adapters()
        if len(now) != len(self._start) or any(a is not b for a, b in zip(now, self._start, strict=True)):
            why, fix = (
                "the next tensors would not belong to the first ones",
                "merge, unmerge and remove after the block",
            )
            raise SurgeryError("the model's adapters changed inside the block of synced", why=why, fix=fix)
        with neutral(self.root), torch.no_grad():
            return next(self._items)

    def _adapters(self) -> list[Any]:
        """What is merged at each site, and the records of its rules."""
        sites = self.chosen.merged or self.chosen.sites
        return [record for _, _, site in sites for record in (site.merged, *site.applied)]

    def _run(self) -> Iterator[tuple[str, Tensor]]:
        done: set[str] = set()
        for key, tensor in base_state_dict(self.root).items():
            path = next((p for p in _parents(key) if self._first.get(p, p) in self._packed), None)
            if path is not None:
                if path not in done:
                    done.add(path)
                    for name, value in self._dequantised(self._first.get(path, path)).items():
                        yield f"{path}.{name}" if path else name, value
                continue
            alias = next((p for p in reversed(_parents(key)) if p in self._first), None)
            source = key if alias is None else f"{self._first[alias]}.{key.removeprefix(alias).lstrip('.')}".lstrip(".")
            for parent in _parents(source):
                if parent in self._sites and parent not in self._computed:
                    self._compute(parent)
            value = self._values.get(source)
            if value is None:
                value = self._offloaded_value(source) if tensor.is_meta else tensor.detach()
            if alias is None:
                self._values.pop(source, None)
            yield key, value

    def _offloaded_value(self, key: str) -> Tensor:
        path, _, name = key.rpartition(".")
        return value_at(self._modules[path], name)

    def _compute(self, top: str) -> None:
        """Fold the rules of a site, and of the sites inside it, which may change the same tensors."""
        for path, (module, site) in self._sites.items():
            if path == top or not top or path.startswith(f"{top}."):
                if path not in self._packed:
                    rules = self.chosen.rules[id(module)]
                    _Folding(path, module, site, self.settings, self._values).run(self._owners, rules)
                self._computed.add(path)

    def _dequantised(self, path: str) -> dict[str, Tensor]:
        if path in self._kept:
            return self._kept[path]
        entry = self._sites.get(path)
        rules = self.chosen.rules[id(entry[0])] if entry is not None else []
        module, site = self._packed[path], entry[1] if entry is not None else None
        values = merged_dense(path, module, site, rules, self._dense, self.settings)
        if path in self._first:
            self._kept[path] = values
        return values


class _Folding(SiteFolding):
    """Folds the rules of a site into new tensors. The module keeps its own."""

    def __init__(
        self, path: str, module: nn.Module, site: SiteState, settings: MergeSettings, values: dict[str, Tensor]
    ):
        super().__init__(module, site.base, path, settings, Journal())
        self.site, self.values = site, values
        self._originals: dict[str, Tensor] = {}

    def run(self, owners: Owners, rules: list[Applied]) -> None:
        absent, names = dict(self.module.named_parameters()), list[str]()
        with torch.no_grad(), weights_present(self.module):
            for _, changes in changes_of_rules(self.module, self.site, rules, self):
                for name, change in changes.items():
                    check_foldable(owners, self.module, name, change, self.where, self.settings.untie)
                    self.add(name, change)
                    names.append(name)
            self.finish()
        if not self.settings.untie and is_offloaded(self.module):
            check_unshared(owners, self.module, absent, names, self.where)

    def tensor(self, name: str) -> Tensor:
        return self.values.get(self._key(name), tensor_at(self.module, name).detach())

    def source(self, name: str, base: bool) -> Tensor:
        self._flush(name)
        return self._originals.get(name, self.tensor(name)) if base else self.tensor(name)

    def mark_base(self) -> None:
        super().mark_base()
        self._originals.clear()

    def _key(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def _fold(self, name: str, change: Change) -> None:
        tensor = self.tensor(name)
        if isinstance(change, Tensor) and change.shape != tensor.shape:
            shapes = f"{tuple(change.shape)}, not {tuple(tensor.shape)}"
            raise MergeError(f"a merged {name} has the shape {shapes}", where=self.where)
        self._originals.setdefault(name, tensor)
        self.values[self._key(name)] = folded_value(tensor, change, self._rounding(name))


def _is_shared(owners: Owners, module: nn.Module) -> bool:
    """Whether a parameter serves another module, too."""
    own = module.named_parameters()
    return any(len(owners.of(tensor)) > 1 or tensor.is_meta and keys_that_share(module, name) for name, tensor in own)


def _parents(key: str) -> list[str]:
    """The paths of the modules around a tensor, from the model itself to the module that has it."""
    parts = key.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]
