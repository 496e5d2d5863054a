"""The change of a site's tensors by the rules of some adapters, as low-rank factors where these are known."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from surgery.arithmetic.exact_fold import Change, LowRank, folded_value
from surgery.arithmetic.low_rank import has_float64
from surgery.errors import MergeError
from surgery.forward.offloaded_weights import value_at
from surgery.merging.site_merge import changes_of_rules
from surgery.packed.packed_map import packed_by_name
from surgery.packed.packed_parameters import is_packed
from surgery.state.records import Applied, SiteState

__all__ = ["SiteChange", "change_of_site"]


@dataclass
class SiteChange:
    """The changes of a site's weights by name, of its bias, and the rules that stay as they are.

    A weight's change is a `LowRank` if all its rules have known factors, else ΔW in a wide dtype.
    """

    weights: dict[str, LowRank | Tensor] = field(default_factory=dict)
    bias: Tensor | None = None
    kept: list[Applied] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)  # further tensors that change: name → label of the rule


def change_of_site(
    module: nn.Module,
    site: SiteState,
    chosen: list[Applied],
    weights: Collection[str],
    weight_of: Callable[[Applied], float],
) -> SiteChange:
    """Returns the sum of the changes of the chosen rules. `weights`: names of the matrices that LoRA can change.

    Rules that put copies in the place of the base's tensors, and rules that change none of these matrices, are kept:
    the changes of the others are relative to what they leave.
    """
    result, tensors = SiteChange(), _WideTensors(module, site.path)
    for applied, changes in changes_of_rules(module, site, chosen, tensors, weight_of):
        if applied.rule.exclusive or not any(name in weights for name in changes):
            result.kept.append(applied)
            tensors.replace(changes)
            continue
        for name, change in changes.items():
            tensors.add(name, change)
            if name not in weights and name != "bias":
                result.others[name] = applied.rule.label
    for name in tensors.changed:
        change = tensors.change(name)
        if name == "bias":
            result.bias = change if isinstance(change, Tensor) and bool(change.any()) else None
        elif name in weights:
            result.weights[name] = change
    return result


class _WideTensors:
    """A site's tensors in float64 while changes are added to them. Low-rank changes are added when it is read."""

    def __init__(self, module: nn.Module, where: str):
        self.module, self.where = module, where
        self.changed: dict[str, None] = {}
        self._low_rank: dict[str, list[LowRank]] = {}  # changes that no tensor holds yet
        self._added: dict[str, list[LowRank]] = {}  # all changes of a tensor, while these are its only ones
        self._start: dict[str, Tensor] = {}
        self._now: dict[str, Tensor] = {}
        self._base: dict[str, Tensor] | None = None

    def source(self, name: str, base: bool) -> Tensor:
        self._settle(name)
        now = self._tensor(name)
        return now if not base or self._base is None else self._base.get(name, self._start[name])

    def mark_base(self) -> None:
        for name in self.changed:
            self._settle(name)
        self._base = dict(self._now)

    def replace(self, changes: dict[str, Change]) -> None:
        """Change tensors without counting it as a change."""
        for name, change in changes.items():
            self._settle(name)
            before, new = self._tensor(name), folded_value(self._tensor(name), change)
            if name in self.changed:
                self._start[name] = self._start[name] + (new - before)
            else:
                self._start[name] = new
            self._now[name] = new

    def add(self, name: str, change: Change) -> None:
        first = name not in self.changed
        self.changed[name] = None
        if isinstance(change, LowRank) and change.gain is None and (first or name in self._added):
            self._added.setdefault(name, []).append(change)
            self._low_rank.setdefault(name, []).append(change)
            return
        self._settle(name)
        self._added.pop(name, None)
        self._now[name] = folded_value(self._tensor(name), change)

    def change(self, name: str) -> LowRank | Tensor:
        added = self._added.get(name, [])
        if len(added) == 1:
            return added[0]
        if added and all(change.groups == 1 for change in added):
            return LowRank.join(added)
        self._settle(name)
        return self._now[name] - self._start[name]

    def _settle(self, name: str) -> None:
        for change in self._low_rank.pop(name, []):
            self._now[name] = folded_value(self._tensor(name), change)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._now:
            packed = packed_by_name(self.module).get(name)
            tensor = value_at(self.module, name).detach() if packed is None else packed.dequantise().detach()
            if is_packed(tensor) or tensor.is_meta:
                raise MergeError(
                    "a rule's change can't be computed here",
                    where=self.where,
                    why=f"it needs the values of the {name}, which is "
                    + ("on the meta device" if tensor.is_meta else f"a {type(tensor).__name__} of {tensor.dtype}"),
                    fix="convert the adapter on the base with its weights, in a floating-point dtype",
                )
            double = torch.float64 if has_float64(tensor.device) else torch.float32
            if tensor.is_complex():
                tensor = tensor.to(double.to_complex())
            elif tensor.is_floating_point():
                tensor = tensor.to(double)
            self._now[name] = self._start[name] = tensor
        return self._now[name]
