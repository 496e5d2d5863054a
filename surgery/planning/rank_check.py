"""Finds ranks above the largest possible rank of a weight: they cost memory and time without effect."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, cast

from torch import nn

from surgery.authoring.hook_call import HookCall
from surgery.authoring.planned_rule import PlannedRule
from surgery.authoring.rule import Rule
from surgery.errors import abbreviate
from surgery.packed.packed_weight import packed_weight_of
from surgery.patterns.own_entries import own_parameter

__all__ = ["rank_notes", "rank_warnings"]

ExcessRanks = tuple[
    Rule, list[tuple[str, int, tuple[int, int]]], bool
]  # a rule, its sites that allow less, whether to warn


def rank_warnings(steps: Sequence[PlannedRule]) -> list[str]:
    """A warning for each rule whose rank is above a weight's larger size, probably meant for other weights."""
    return [_message(rule, sites) for rule, sites, warns in _excess_ranks(steps) if warns]


def rank_notes(steps: Sequence[PlannedRule]) -> list[str]:
    """A note for each other rule with a weight that can't use its rank, such as a head of two classes."""
    return [_message(rule, sites) for rule, sites, warns in _excess_ranks(steps) if not warns]


def _excess_ranks(steps: Sequence[PlannedRule]) -> Iterable[ExcessRanks]:
    """The sites of each rule that can't use its rank. The field's default rank is never reported."""
    by_rule: dict[int, list[PlannedRule]] = {}
    for step in steps:
        by_rule.setdefault(id(step.rule), []).append(step)
    for mine in by_rule.values():
        unasked = _default_rank(mine[0].rule)
        rule, few, wide = mine[0].rule, list[tuple[str, int, tuple[int, int]]](), False
        for path, sizes in itertools.chain.from_iterable(_matrices(step) for step in mine):
            rank = rule.rank_at(path)
            if rank is not None and rank != unasked and rank > min(sizes):
                few.append((path, rank, sizes))
                wide = wide or rank > max(sizes)
        if few:
            yield rule, few, wide


def _matrices(step: PlannedRule) -> Iterable[tuple[str, tuple[int, int]]]:
    """The matrices that a rule changes at a site, with their sizes."""
    with HookCall(step.rule, "matrices", step.path):
        named = step.rule.matrices(step.module, step.path)
    if named is not None:
        return named.items()
    sizes = _sizes(step.module)
    return [(step.path, sizes)] if sizes is not None else []


def _default_rank(rule: Rule) -> Any:
    """The default of a rule's field `rank`."""
    return next((field.default for field in fields(cast(Any, rule)) if field.name == "rank"), None)


def _message(rule: Rule, sites: Sequence[tuple[str, int, tuple[int, int]]]) -> str:
    ranks, useful = {rank for _, rank, _ in sites}, {min(sizes) for _, _, sizes in sites}
    most = f"{min(useful)}" if len(useful) == 1 else f"{min(useful)} to {max(useful)}, by their sizes"
    ranks_text = f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    where = abbreviate([path or "the model itself" for path, _, _ in sites])
    return f"{rule.label}: {ranks_text} is more than the weights at {where} can use; the largest useful rank is {most}"


def _sizes(module: Any) -> tuple[int, int] | None:
    """The sizes of a module's weight as a matrix; for packed weights, those of the unpacked matrix."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    packed = packed_weight_of(module)
    if packed is not None:
        return packed.shape
    weight = own_parameter(module, "weight")
    if weight is None or weight.dim() < 2 or not weight.is_floating_point():
        return None
    return weight.shape[0], weight[0].numel()
