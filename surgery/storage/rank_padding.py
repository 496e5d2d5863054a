"""Gives an adapter's tensors room for a larger rank, so that a hot-swap can bring it."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surgery.authoring.hook_call import HookCall
from surgery.authoring.live_site import LiveSite
from surgery.authoring.planned_rule import PlannedRule
from surgery.authoring.rule import Rule
from surgery.errors import RuleError, SiteError
from surgery.forward.tape import Layer
from surgery.patterns.module_walk import RESERVED
from surgery.rewritten_model.verb_root import rewritten
from surgery.sharded_tensors import is_flattened
from surgery.state.in_use import check_free
from surgery.state.record_undo import keep_site
from surgery.storage.hotswap_plan import AdapterSite, adapter_sites, step_for, unmerged_tensors
from surgery.transaction.neutral_context import verb
from surgery.transaction.undo_log import Journal
from surgery.weaving.site_class import install_live

__all__ = ["pad_rank"]

M = TypeVar("M", bound=nn.Module)


@verb
def pad_rank(model: M, adapter: str, rank: int) -> M:
    """Give an adapter's tensors room for a rank, so that `hotswap` can bring any rank up to it.

    >>> from torch import nn
    >>> from surgery import apply_rules, pad_rank, rules_of
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2, alpha=4), adapter="a")
    >>> tuple(pad_rank(model, "a", 16)[0].adapters.a.B.shape), rules_of(model)[0].rank, rules_of(model)[0].max_rank
    ((8, 16), 2, 16)

    The rule keeps its rank, and with it its scale. Further ranks are zero, and stay zero in training: neither half has
    a gradient where the other is zero. The output is the same up to the order in which a matrix product sums. A rule
    can have room from the start: `LoraRule(…, max_rank=16)`.

    Args:
        model: a model with the adapter.
        adapter: the adapter's name.
        rank: the largest rank that will be swapped in.

    Returns:
        The same model.

    Raises:
        RuleError: none of the adapter's rules has a rank, or one uses more than this.
        SiteError: a tensor is sharded.
        SurgeryError: the adapter is unknown or merged.

    Notes:
        Tensors that grow are new Parameters: pad before making an optimizer and before `torch.compile`. Others stay the
        same.

    Source: PEFT's `prepare_model_for_compiled_hotswap(target_rank=…)`.
    """
    root, state = rewritten(model)
    check_free(root)
    live = adapter_sites(root, state, adapter)
    wider = {id(rule): rule.padded(rank) for rule in state.adapters[adapter]}
    grown = [(site, change) for site in live.values() if (change := _grow_site(site, adapter, rank, wider)) is not None]
    if not grown:
        kinds = ", ".join(dict.fromkeys(rule.label for rule in state.adapters[adapter]))
        raise RuleError(f"the adapter {adapter!r} has no rank to pad", why=f"its rules: {kinds}")
    with Journal() as journal:
        for site, (step, tensors) in grown:
            _replace_tensors(site, adapter, step, tensors, journal)
        for module in {id(site.module): site.module for site, _ in grown}.values():
            install_live(module, journal)
        journal.keep(state.adapters)
        state.adapters[adapter] = tuple(wider[id(rule)] for rule in state.adapters[adapter])
    return model


def _grow_site(
    live_site: AdapterSite, adapter: str, rank: int, known: dict[int, Rule]
) -> tuple[PlannedRule, dict[str, Tensor]] | None:
    """Returns a padded rule's step and its tensors in their new sizes; None if the rule has no rank.

    `known`: padded rules by the ids of the old ones.
    """
    rule = live_site.applied.rule
    wider = known[id(rule)] if id(rule) in known else rule.padded(rank)
    if wider is rule:
        return None
    if any(hasattr(tensor, "device_mesh") or is_flattened(tensor) for tensor in live_site.tensors.values()):
        raise SiteError("its tensors are sharded", where=live_site.path, fix="pad before fully_shard")
    step = step_for(wider, live_site.path, live_site, adapter)
    params = {name: tensor.detach() for name, tensor in live_site.tensors.items()}
    source = unmerged_tensors(live_site.module, live_site.path)
    site = LiveSite(live_site.module, live_site.path, adapter, params, source)
    with torch.no_grad(), HookCall(rule, "swapped", live_site.path):
        return step, dict(rule.swapped(wider, site))


def _replace_tensors(
    site: AdapterSite, adapter: str, step: PlannedRule, tensors: dict[str, Tensor], journal: Journal
) -> None:
    """Replaces the rule and its tensors by the padded ones. Tensors of the same size stay."""
    box: Any = site.module._modules[RESERVED]._modules[adapter]  # type: ignore[union-attr]
    keep_site(journal, site.module, (adapter,))
    for name, old in site.tensors.items():
        if tensors[name].shape != old.shape:
            tensors_of_box = box._parameters if name in box._parameters else box._buffers
            new = tensors[name].to(old.dtype)
            tensors_of_box[name] = (
                nn.Parameter(new, requires_grad=old.requires_grad) if tensors_of_box is box._parameters else new
            )
    applied = site.applied
    journal.keep(applied.__dict__)
    applied.rule, applied.facts = step.rule, step.facts
    applied.layer = Layer(adapter, step.rule.label, step.tape)
