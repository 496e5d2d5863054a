"""Makes adapters live or idle, each with a weight, and lists the adapters of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from surgery.authoring.rule import Rule
from surgery.errors import SurgeryError, abbreviate
from surgery.lifecycle.switching import check_none_merged, set_trained, switch, weights_now
from surgery.patterns.module_walk import base_modules
from surgery.results import Displayed, Table
from surgery.rewritten_model.structural_adapters import check_not_structural
from surgery.rewritten_model.verb_root import check_parts_idle, rewritten, rewritten_if_any
from surgery.state.adapter_naming import adapter_names
from surgery.state.in_use import check_free, claim
from surgery.state.records import ModelState, model_state, site_state
from surgery.transaction.garbage_collection import collector_waits
from surgery.transaction.neutral_context import neutral, verb
from surgery.transaction.undo_log import Journal

__all__ = ["Adapter", "activate", "active", "adapters", "deactivate", "using"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Adapter(Displayed):
    """One adapter, as `adapters` lists it: rules, paths of its sites, number of parameters, whether live or merged.

    `weight`: its changes are multiplied by this number while it is live.
    """

    rules: tuple[Rule, ...]
    sites: tuple[str, ...]
    parameters: int
    live: bool
    merged: bool
    weight: float = 1.0

    def __repr__(self) -> str:
        """As a dataclass prints itself; more than five sites or rules are shortened."""
        rules = ", ".join(map(repr, self.rules)) if len(self.rules) <= 5 else abbreviate(map(repr, self.rules), "rules")
        sites = repr(self.sites) if len(self.sites) <= 5 else f"({abbreviate(map(repr, self.sites))})"
        counts = f"parameters={self.parameters}, live={self.live}, merged={self.merged}, weight={self.weight}"
        return f"Adapter(rules=({rules}{',' * (len(self.rules) == 1)}), sites={sites}, {counts})"

    __str__ = __repr__

    def _display_parts(self) -> list[str | Table]:
        """One table, for notebooks and rich."""
        return [Table(["rules", "sites", "parameters", "state"], [self._cells()])]

    def _cells(self) -> list[str]:
        """The texts of a row: rules, sites, parameters and state."""
        weight = f" × {self.weight:g}" if self.weight != 1.0 else ""
        state = "merged" if self.merged else f"live{weight}" if self.live else "idle"
        return [", ".join(rule.label for rule in self.rules), abbreviate(self.sites), f"{self.parameters:,}", state]


Weights = float | Sequence[float] | Mapping[str, float] | None


@verb
def activate(
    model: M, adapter: str | Sequence[str] | None = None, weights: Weights = None, *, train: bool | None = None
) -> M:
    """Make these adapters live and all others idle.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import activate, active, adapters, apply_rules
    >>> from surgery.rules import LoraRule
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> for name in ("a", "b"):
    ...     _ = apply_rules(model, LoraRule("0", rank=2), adapter=name)
    >>> active(model)
    ('a', 'b')
    >>> active(activate(model, "b"))
    ('b',)
    >>> _ = activate(model, ["a", "b"], weights=[0.7, -0.3])
    >>> adapters(model)["b"].weight
    -0.3

    Adapters with structural rules alone are always live, with weight 1.

    Only live adapters train: the tensors of idle adapters do not require gradients, and `activate` restores their
    flags. A site without live adapters has its own class. Several live adapters edit a site in the order in which they
    were applied.

    Args:
        model: the model.
        adapter: a name or several names. None: the adapters that were live before `deactivate`.
        weights: a number for all, one number for each name, or a mapping from names to numbers; default 1. An adapter's
            changes of outputs, inputs and parameters are multiplied by its weight, and `merge` folds them with it.
            Rules that do not add a difference of numbers (prefixes, prompts) only take the weight 1.
        train: False freezes the tensors of these adapters; True lets the tensors train that their rules train.
            None: the flags stay as they are.

    Returns:
        The same model object.

    Raises:
        SurgeryError: an unknown adapter; a weight that is not a finite number, or that a rule does not take; a merged
            model; an idle adapter that changed the base's weights at its start (PiSSA); another thread inside `using`;
            a call inside `route`; a part of the model that has live adapters of its own. The model is unchanged.

    PEFT: `set_adapter`, `set_scale`.
    """
    root, state = rewritten(model)
    check_parts_idle(root)
    if adapter is None:
        live = state.resting or weights_now(state)
        adapter, weights = list(live), live if weights is None else weights
    live = _requested(state, adapter, weights)
    check_free(root)
    check_none_merged(state)
    with Journal() as journal:
        switch(root, live)
        journal.attribute(state, "resting")
        state.resting = {}
        if train is not None:
            set_trained(root, live, train)
    return model


@verb
def deactivate(model: M) -> M:
    """Make all adapters idle: outputs are the base's to the bit, and each site has its own class.

    >>> from torch import nn
    >>> from surgery import activate, active, apply_rules, deactivate
    >>> from surgery.rules import LoraRule
    >>> model = deactivate(apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2)))
    >>> type(model[0]) is nn.Linear, active(activate(model))
    (True, ('default',))

    `activate(model)` makes the same adapters live again, with their weights. Structural rules stay in force, because
    they do not edit forwards. Adapters that have no other rules are always live.

    Returns:
        The same model object.

    Raises:
        SurgeryError: as `activate`; or all adapters have structural rules alone.

    PEFT: `disable_adapter_layers`, `enable_adapter_layers`.
    """
    root, state = rewritten(model)
    check_parts_idle(root)
    check_free(root)
    check_none_merged(state)
    structural = state.structural
    if structural and len(structural) == len(state.adapters):
        check_not_structural(state, structural, "be made idle", "remove(model, …) undoes it")
    live = {name: weight for name, weight in weights_now(state).items() if name not in structural}
    with Journal() as journal:
        switch(root, {})
        journal.attribute(state, "resting")
        state.resting = live or state.resting
    return model


def active(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the live adapters, merged ones included, in the order in which they were applied.

    A model without adapters gives an empty tuple.

    >>> from torch import nn
    >>> from surgery import active, apply_rules
    >>> from surgery.rules import LoraRule
    >>> active(apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2)))
    ('default',)
    """
    found = rewritten_if_any(model)
    return () if found is None else tuple(weights_now(found[1]))


class AdapterTable(dict[str, Adapter], Displayed):
    """The adapters of a model by name: a dict, which notebooks and rich show as a table."""

    def __str__(self) -> str:
        return dict.__repr__(self)

    def _display_parts(self) -> list[str | Table]:
        rows = [[name, *adapter._cells()] for name, adapter in self.items()]
        return [Table(["adapter", "rules", "sites", "parameters", "state"], rows)]


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return an `Adapter` for each adapter's name: its rules, sites, number of parameters, and whether live or merged.

    A model without adapters gives an empty mapping.

    >>> from torch import nn
    >>> from surgery import adapters, apply_rules
    >>> from surgery.rules import LoraRule
    >>> found = adapters(apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2), adapter="a"))
    >>> found["a"].sites, found["a"].parameters, found["a"].live
    (('0',), 32, True)
    """
    found = rewritten_if_any(model)
    if found is None:
        return AdapterTable()
    root, state = found
    paths = {id(module): path for path, module in base_modules(root)}
    rows = {
        name: Adapter(
            rules,
            tuple(paths[id(site)] for site in state.places[name].modules if id(site) in paths),
            sum(t.numel() for box in state.places[name].boxes for t in box.tensors().values() if _is_trained(t)),
            state.standing[name].live,
            any(_is_merged(site, name) for site in state.places[name].modules),
            state.standing[name].weight,
        )
        for name, rules in state.adapters.items()
    }
    return AdapterTable(rows)


@contextmanager
def using(model: nn.Module, adapter: str | Sequence[str] | None, weights: Weights = None) -> Iterator[None]:
    """Make these adapters live inside a `with` block; the end of the block restores the earlier ones.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import active, apply_rules, using
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2))
    >>> with using(model, None):
    ...     active(model)
    ()
    >>> active(model)
    ('default',)

    An exception inside the block restores the earlier adapters, too. All threads share one set of live adapters; with
    `route`, each thread has adapters of its own.

    Args:
        model: the model.
        adapter: a name, several names, or None for no adapter.
        weights: as for `activate`.

    Raises:
        SurgeryError: as `activate`, and if another thread is inside `using` on this model.

    PEFT: `disable_adapter()`, and `set_adapter` twice.
    """
    root, state = rewritten(model)
    check_parts_idle(root)
    live = _requested(state, [] if adapter is None else adapter, weights)
    with claim(root):
        before, resting = weights_now(state), state.resting
        check_none_merged(state)
        try:
            try:
                with neutral(root), Journal() as journal, collector_waits():
                    switch(root, live)
                    journal.attribute(state, "resting")
                    state.resting = dict(before or resting)
                yield
            finally:
                _restore(root, before, resting)
        finally:  # once more, if an interrupt broke the first off; otherwise this changes nothing
            _restore(root, before, resting)


def _restore(model: nn.Module, before: Mapping[str, float], resting: Mapping[str, float]) -> None:
    """Make the adapters live again that were live before a block and were not removed in it."""
    state = model_state(model)
    if state is not None:  # None: the block removed the last adapter
        with neutral(model), Journal() as journal, collector_waits():
            switch(model, {name: weight for name, weight in before.items() if name in state.adapters})
            journal.attribute(state, "resting")
            state.resting = {name: weight for name, weight in resting.items() if name in state.adapters}


def _requested(state: ModelState, adapter: str | Sequence[str], weights: Weights) -> dict[str, float]:
    """The weight of each adapter that a call makes live; `SurgeryError` for arguments that do not fit."""
    if isinstance(adapter, Mapping):
        fix = "name them and give the mapping as weights: activate(model, list(weights), weights)"
        raise SurgeryError("the adapters' names are a mapping", why="its values would be ignored", fix=fix)
    names = adapter_names(state, adapter)
    if isinstance(weights, Mapping):
        adapter_names(state, list(weights))
        values = [weights.get(name, 1.0) for name in names]
        if unnamed := [name for name in weights if name not in names]:
            raise SurgeryError(
                f"there is a weight for {unnamed[0]!r}, which is not among the adapters", fix="name it, too"
            )
    else:
        same = 1.0 if weights is None else weights
        values = [same] * len(names) if isinstance(same, (int, float)) else list(same)
    if len(values) != len(names):
        raise SurgeryError(
            f"there are {len(values)} weights for {len(names)} adapters", fix="give one for each, or one number for all"
        )
    for name, weight in zip(names, values, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise SurgeryError(f"the weight {weight!r} of {name!r} is not a finite number")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SurgeryError(f"the adapter {twice!r} is named twice", fix="name it once, with the sum of its weights")
    return {name: float(weight) for name, weight in zip(names, values, strict=True)}


def _is_trained(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _is_merged(module: nn.Module, name: str) -> bool:
    site = site_state(module)
    return site is not None and site.merged is not None and name in site.merged.adapters
