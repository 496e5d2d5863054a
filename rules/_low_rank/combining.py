"""Combines low-rank rules: the factors of each adapter at a site, and the rule of the result."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from surgery import Combination, Rule, Share
from surgery.rules._linear.layouts import Layout, WeightPart, gain_of, layout_of
from surgery.rules._low_rank.rule import LowRankRule
from surgery.rules._shared import combining

# Fields that may differ between the adapters: the result has its own values, or its factors include them.
_FREE = ("rank", "alpha", "rank_pattern", "alpha_pattern", "max_rank", "rslora", "dora", "lora_bias", "bias", "dtype")


def combine(shares: Sequence[Share], how: Combination) -> tuple[Rule, combining.Tensors]:
    rules = [cast(LowRankRule, share.rule) for share in shares]
    dora = next((share for share, rule in zip(shares, rules, strict=True) if rule.dora), None)
    if dora is not None and how.untouched(shares):
        return rules[0], shares[0].params
    if dora is not None and not how.by_matrix:
        why = f"DoRA in {dora.adapter!r} rescales the whole weight: its ΔW does not have a low rank"
        raise how.refusal(shares, why, "method='svd', with as high a rank as you like, takes its ΔW as a matrix")
    if not rules[0].invertible:
        if how.untouched(shares):
            return rules[0], shares[0].params
        raise how.refusal(shares, "how its tensors follow from low-rank factors is not known (it has no `tensors_for`)")
    how.agree(shares, *_FREE)
    if any(rule.dora and rule.lora_bias for rule in rules):
        raise how.refusal(shares, "DoRA rescales what lora_bias adds, too, which no bias of the result can hold")

    module, path = shares[0].site.module, shares[0].site.path
    layouts = [cast(Layout, layout_of(module, rule.room_at(path))) for rule in rules]
    rank = _rank(how, shares, rules, layouts)
    layout = layout_of(module, rank)
    rule = _rule(rules, how, rank, layout)
    if isinstance(layout, str) or (why := rule.check(module, path)):
        raise how.refusal(shares, layout if isinstance(layout, str) else str(why))
    results: dict[str, Tensor] = {}
    for index, part in enumerate(layout.parts):
        parts = [layout.parts[index] for layout in layouts]
        up, down = _factors(how, shares, rules, parts, part, rank)
        own = rule.scale_at(path)
        up = up if own == 1 else up / own
        tensors = rule.tensors_for(part, down.reshape(part.A), up.reshape(part.B))
        results |= {part.prefix + name: tensor for name, tensor in tensors.items()}
    biased = [(share, rule) for share, rule in zip(shares, rules, strict=True) if rule.lora_bias]
    if biased:
        added = [share.params["B_bias"] * rule.scale_at(path) for share, rule in biased]
        results["B_bias"] = how.sum(added, [share.weight for share, _ in biased])
    return rule, results


def _rank(how: Combination, shares: Sequence[Share], rules: Sequence[LowRankRule], layouts: Sequence[Layout]) -> int:
    largest = combining.largest_rank(how)
    if how.method == "svd" and any(rule.dora for rule in rules):  # the rank of its ΔW is not the sum of the ranks
        return how.rank or largest
    rank = combining.rank_of(how, shares, [rule.room_at(shares[0].site.path) for rule in rules], largest)
    groups = getattr(shares[0].site.module, "groups", 1)
    divided = all(layout.parts[0].groups == groups for layout in layouts)
    # If the groups divide the rank, each rank belongs to one group, and a sum over all groups does not fit.
    return rank + 1 if how.whole and not divided and rank % groups == 0 else rank


def _rule(rules: Sequence[LowRankRule], how: Combination, rank: int, layout: Layout | str) -> LowRankRule:
    """Returns the rule of the result. Its scale is 1."""
    first = rules[0]
    return first.resized(
        rank,
        dropout=0.0 if isinstance(layout, Layout) and layout.weight_space else first.dropout,
        bias=first.bias if combining.all_agree(how, "bias") else "none",
        lora_bias=any(rule.lora_bias for rule in rules),
        rslora=False,
        dora=False,
        dtype=first.dtype if len({rule.dtype for rule in rules}) == 1 else None,
    )


def _factors(
    how: Combination,
    shares: Sequence[Share],
    rules: Sequence[LowRankRule],
    parts: Sequence[WeightPart],
    part: WeightPart,
    rank: int,
) -> tuple[Tensor, Tensor]:
    path = shares[0].site.path
    scales = [rule.scale_at(path) for rule in rules]
    tensors = [
        rule.factors_of(share.params, part_of_share)
        for rule, share, part_of_share in zip(rules, shares, parts, strict=True)
    ]

    # Factors that all groups of a convolution share become factors of each group: this needs the whole ΔW.
    whole = any(rule.dora for rule in rules) or any(share_part.groups < part.groups for share_part in parts)
    if whole or (how.by_matrix and how.method != "svd"):
        arguments = zip(shares, rules, parts, tensors, scales, strict=True)
        deltas = [_delta(*share_arguments, part.groups) for share_arguments in arguments]
        return combining.factors(how, shares, scales, [], [], rank // part.groups, deltas)
    pairs = [_matrices(share_part, A, B, part.groups) for share_part, (A, B) in zip(parts, tensors, strict=True)]
    ups, downs = [up for up, _ in pairs], [down for _, down in pairs]
    return combining.factors(how, shares, scales, ups, downs, rank // part.groups)


def _matrices(part: WeightPart, A: Tensor, B: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Returns (groups, out, rank) and (groups, rank, in), one pair per group; groups=1: one pair for all groups."""
    up, down = B.flatten(1), A.flatten(1)
    if part.groups > groups:
        return torch.block_diag(*up.chunk(part.groups)).unsqueeze(0), down.unsqueeze(0)
    return up.unflatten(0, (groups, -1)), down.unflatten(0, (groups, -1))


def _delta(
    share: Share, rule: LowRankRule, part: WeightPart, tensors: tuple[Tensor, ...], scale: float, groups: int
) -> Tensor:
    """Returns ΔW as (groups, out, in)."""
    A, B = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)
    delta = part.delta(A, B) * scale
    if rule.dora:
        base = share.site.tensor(part.weight).detach().to(A.dtype)
        changed = base + delta
        delta = gain_of(part, share.params[part.prefix + "magnitude"].detach(), changed) * changed - base
    rows = delta.t() if part.turned else delta.flatten(1)
    return rows.unflatten(0, (groups, -1))


def unite(rules: Mapping[str, LowRankRule]) -> Mapping[str, Rule]:
    """Merges rules that differ only in ranks and alphas into one rule with patterns of whole paths."""
    plain = {"rank": 1, "alpha": 1, "rank_pattern": None, "alpha_pattern": None, "targets": ()}
    plain |= {"exclude": (), "layers": None, "expect": None}
    groups: list[tuple[LowRankRule, list[str]]] = []
    by_hash: dict[int, list[tuple[LowRankRule, list[str]]]] = {}  # by hash
    for path, rule in rules.items():
        bare = rule.replace(**plain)
        same = by_hash.setdefault(_hash(bare), [])
        paths = next((paths for other, paths in same if other == bare), None)
        if paths is None:
            same.append((bare, paths := []))
            groups.append(same[-1])
        paths.append(path)
    merged: dict[str, Rule] = {}
    for bare, paths in groups:
        ranks = {path: rules[path].rank_at(path) for path in paths}
        alphas = {path: rules[path].alpha_at(path) for path in paths}
        (rank, rank_pattern), (alpha, alpha_pattern) = _patterns(ranks), _patterns(alphas)
        common = bare.replace(rank=rank, alpha=alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
        merged |= dict.fromkeys(paths, common if len(groups) == 1 else common.alone())
    return {path: merged[path] for path in rules}


def _hash(rule: Rule) -> int:
    try:
        return hash(rule)
    except TypeError:  # a subclass's field that can't be hashed
        return 0


def _patterns(values: Mapping[str, float]) -> tuple[float, dict[str, float] | None]:
    """Returns the most common value, and patterns of whole paths for the others."""
    common = Counter(values.values()).most_common(1)[0][0]
    others: dict[float, list[str]] = {}
    for path, value in values.items():
        if value != common:
            others.setdefault(value, []).append(re.escape(path))
    return common, {f"^(?:{'|'.join(paths)})": value for value, paths in others.items()} or None
