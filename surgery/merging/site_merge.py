"""Merges rules at one site: their changes in the order of the graph, folded into the site's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from surgery.arithmetic.exact_fold import Change, LowRank, Rows, scale_change
from surgery.authoring.hook_call import HookCall
from surgery.authoring.live_site import LiveSite
from surgery.errors import MergeError
from surgery.forward.own_forward import own_forward
from surgery.forward.parameter_view import tensor_at
from surgery.merging.linear_delta import merged_tensors
from surgery.merging.merge_settings import MergeSettings
from surgery.merging.site_folding import SiteFolding, check_foldable
from surgery.state.adapter_tensors import tensors_of
from surgery.state.parameter_owners import Owners
from surgery.state.record_undo import keep_site
from surgery.state.records import Applied, Merged, SiteState
from surgery.transaction.undo_log import Journal
from surgery.weaving.rewrite_recording import layer_of

__all__ = ["Folding", "NotFiniteError", "changes_of_rules", "check_finite", "merge_site", "owner_of"]


class NotFiniteError(MergeError):
    """A merge with `safe` gives values that are not finite."""


def merge_site(
    owners: Owners,
    path: str,
    module: nn.Module,
    site: SiteState,
    names: list[str],
    chosen: list[Applied],
    settings: MergeSettings,
    journal: Journal,
    waiting: list[Any],
) -> None:
    """Fold the chosen rules into the tensors of one site, and note the folds in its record."""
    keep_site(journal, module)
    merged = Merged(tuple(names))
    folding = SiteFolding(module, site.base, path, settings, journal)
    for _, changes in changes_of_rules(module, site, chosen, folding):
        for name, change in changes.items():
            check_foldable(owners, module, name, change, path, settings.untie)
            if settings.untie and name not in merged.tied:
                _untie(owners, module, name, merged, journal)
            folding.add(name, change)
    merged.folds = folding.finish_with(waiting)
    site.merged = merged


def check_finite(
    owners: Owners, path: str, module: nn.Module, site: SiteState, chosen: list[Applied], untie: bool
) -> None:
    """Fold into copies, and raise `NotFiniteError` if a result is not finite (`safe=True`)."""
    folding = SiteFolding(module, site.base, path, MergeSettings("copy"), Journal(), dry=True)
    for _, changes in changes_of_rules(module, site, chosen, folding):
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


class Folding(Protocol):
    """The tensors of a site while the changes of its rules are added to them, one rule after another."""

    def source(self, name: str, base: bool) -> Tensor:
        """Returns a tensor as the present rule sees it, or (`base`) as it was before any rule added to it."""
        ...

    def mark_base(self) -> None:
        """Note that the changes so far replaced the base's parameters; the following changes add to them."""


def changes_of_rules(
    module: nn.Module,
    site: SiteState,
    chosen: list[Applied],
    folding: Folding,
    weight_of: Callable[[Applied], float] = lambda applied: applied.weight,
) -> Iterator[tuple[Applied, dict[str, Change]]]:
    """Yields each rule at a site with its changes, in the order of the graph. The caller adds them to `folding`.

    Rules that replace a parameter act before rules that add to the output. Rules that change the input act on both, the
    last applied first. `weight_of`: the factor of a rule's change.
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
        if (weight := weight_of(applied)) != 1.0:
            changes = {name: scale_change(change, live.tensor(name), weight) for name, change in changes.items()}
        yield applied, changes


def _untie(owners: Owners, module: nn.Module, name: str, merged: Merged, journal: Journal) -> None:
    parameter = tensor_at(module, name)
    if not isinstance(parameter, nn.Parameter) or len(owners.of(parameter)) < 2:
        return
    owner, last = owner_of(module, name), name.rpartition(".")[2]
    untied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    journal.keep(owner._parameters)
    owner._parameters[last] = untied
    owners.note_replacement(owner, last, parameter, untied)
    merged.tied[name] = parameter


def owner_of(module: nn.Module, name: str) -> nn.Module:
    """The module, or the child of the module, that has the tensor of a dotted name."""
    return module.get_submodule(name.rpartition(".")[0])
