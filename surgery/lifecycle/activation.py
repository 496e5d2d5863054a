"""Which adapters are live, each with a weight, and what there is of them."""

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
from surgery.model_record.verb_root import check_parts_idle, rewritten
from surgery.patterns.module_walk import base_modules
from surgery.state.in_use import check_free, claimed
from surgery.state.records import ModelState, adapter_names, model_state, site_state
from surgery.transaction.garbage_collection import collector_waits
from surgery.transaction.neutral_context import neutral, verb
from surgery.transaction.undo_log import Journal

__all__ = ["Adapter", "activate", "active", "adapters", "deactivate", "using"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Adapter:
    """What `adapters` tells of one: its rules, its sites' paths, how many parameters, whether it is live, or merged.

    `weight`: what it changes is multiplied by this while it is live.
    """

    rules: tuple[Rule, ...]
    sites: tuple[str, ...]
    parameters: int
    live: bool
    merged: bool
    weight: float = 1.0

    def __repr__(self) -> str:
        """As a dataclass; of many sites and rules a few."""
        rules = ", ".join(map(repr, self.rules)) if len(self.rules) <= 5 else abbreviate(map(repr, self.rules), "rules")
        sites = repr(self.sites) if len(self.sites) <= 5 else f"({abbreviate(map(repr, self.sites))})"
        told = f"parameters={self.parameters}, live={self.live}, merged={self.merged}, weight={self.weight}"
        return f"Adapter(rules=({rules}{',' * (len(self.rules) == 1)}), sites={sites}, {told})"


Weights = float | Sequence[float] | Mapping[str, float] | None


@verb
def activate(
    model: M, adapter: str | Sequence[str] | None = None, weights: Weights = None, *, train: bool | None = None
) -> M:
    """Make these adapters live, and no others; the same model comes back. None: those that `deactivate` found live.

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

    `weights`: one for each name, or a mapping; without, 1. What an adapter changes of an output, an input or a
    parameter is multiplied by its weight, so that LoRA's branch counts as much; `merge` folds it in so. Rules whose
    change is no difference of numbers (prefixes, prompts) have the weight 1.

    Only live adapters train: the others' tensors stop requiring gradients, and get their flags back with `activate`.
    `train`: False makes these live and frozen, until True lets all train that their rules train. A site that no live
    adapter touches has its own class. The edits of several stand in the order they were applied in.

    All or nothing. Raises `SurgeryError` for an unknown adapter, for a weight that is no finite number or can't be had,
    for a merged model, for an adapter that changed the base's weights at its start (PiSSA), which can be removed but
    not be idle, while another thread is in `using`, inside of `route`, and where a part of the model that was rewritten
    by itself has live adapters. PEFT: `set_adapter`, `set_scale`.
    """
    root, state = rewritten(model)
    check_parts_idle(root)
    if adapter is None:
        live = state.resting or weights_now(state)
        adapter, weights = list(live), live if weights is None else weights
    live = _asked_for(state, adapter, weights)
    check_free(root)
    check_none_merged(state)
    with Journal() as journal:
        switch(root, live)
        journal.attribute(state, "resting")
        state.resting = {}
        if train is not None:
            set_trained(state, live, train)
    return model


@verb
def deactivate(model: M) -> M:
    """Make no adapter live: the model gives the base's bits, and every site has its own class. See `activate`.

    >>> from torch import nn
    >>> from surgery import activate, active, apply_rules, deactivate
    >>> from surgery.rules import LoraRule
    >>> model = deactivate(apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2)))
    >>> type(model[0]) is nn.Linear, active(activate(model))
    (True, ('default',))

    `activate(model)` makes those live again that were, with their weights. PEFT: `disable_adapter_layers`,
    `enable_adapter_layers`.
    """
    root, state = rewritten(model)
    check_parts_idle(root)
    check_free(root)
    check_none_merged(state)
    live = weights_now(state)
    with Journal() as journal:
        switch(root, {})
        journal.attribute(state, "resting")
        state.resting = live or state.resting
    return model


def active(model: nn.Module) -> tuple[str, ...]:
    """The live adapters, in the order they were applied; merged ones too.

    >>> from torch import nn
    >>> from surgery import active, apply_rules
    >>> from surgery.rules import LoraRule
    >>> active(apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2)))
    ('default',)
    """
    return tuple(weights_now(rewritten(model)[1]))


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """What each adapter is: rules, sites, parameters, live or not, merged or not.

    >>> from torch import nn
    >>> from surgery import adapters, apply_rules
    >>> from surgery.rules import LoraRule
    >>> found = adapters(apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2), adapter="a"))
    >>> found["a"].sites, found["a"].parameters, found["a"].live
    (('0',), 32, True)
    """
    root, state = rewritten(model)
    paths = {id(module): path for path, module in base_modules(root)}
    return {
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


@contextmanager
def using(model: nn.Module, adapter: str | Sequence[str] | None, weights: Weights = None) -> Iterator[None]:
    """These adapters are live inside the block (None: none is); on exit those from before are, exceptions included.

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

    `weights` as for `activate`. A model has one set of live adapters for all threads: a second thread that enters
    meanwhile gets a `SurgeryError`; see `route` for threads with adapters of their own.
    PEFT: `disable_adapter()`, and `set_adapter` twice.
    """
    root, state = rewritten(model)
    check_parts_idle(root)
    live = _asked_for(state, [] if adapter is None else adapter, weights)
    with claimed(root):
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
                _put_back(root, before, resting)
        finally:  # once more, where it was broken off; else nothing is left to do
            _put_back(root, before, resting)


def _put_back(model: nn.Module, before: Mapping[str, float], resting: Mapping[str, float]) -> None:
    """Those adapters are live again that were before a block, as far as they are still there."""
    state = model_state(model)
    if state is not None:  # else the last one was removed inside
        with neutral(model), Journal() as journal, collector_waits():
            switch(model, {name: weight for name, weight in before.items() if name in state.adapters})
            journal.attribute(state, "resting")
            state.resting = {name: weight for name, weight in resting.items() if name in state.adapters}


def _asked_for(state: ModelState, adapter: str | Sequence[str], weights: Weights) -> dict[str, float]:
    """The adapters that are to be live, with their weights."""
    if isinstance(adapter, Mapping):
        fix = "name them and give the mapping as weights: activate(model, list(weights), weights)"
        raise SurgeryError("a mapping is given for the adapters' names", why="its values would be passed over", fix=fix)
    names = adapter_names(state, adapter)
    if isinstance(weights, Mapping):
        adapter_names(state, list(weights))
        given = [weights.get(name, 1.0) for name in names]
        if left := [name for name in weights if name not in names]:
            raise SurgeryError(f"there is a weight for {left[0]!r}, which is not to be live", fix="name it, too")
    else:
        alone = [weights] if isinstance(weights, (int, float)) else weights
        given = [1.0] * len(names) if alone is None else list(alone)
    if len(given) != len(names):
        raise SurgeryError(f"there are {len(given)} weights for {len(names)} adapters", fix="give one for each")
    for name, weight in zip(names, given, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise SurgeryError(f"the weight {weight!r} of {name!r} is no finite number")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SurgeryError(f"the adapter {twice!r} is named twice", fix="name it once, with the sum of its weights")
    return {name: float(weight) for name, weight in zip(names, given, strict=True)}


def _is_trained(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _is_merged(module: nn.Module, name: str) -> bool:
    held = site_state(module)
    return held is not None and held.merged is not None and name in held.merged.adapters
