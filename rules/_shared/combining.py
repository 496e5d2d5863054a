"""Helpers of rules for `combine`: sums of low-rank factors, of tensors, and of copies of the base's tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from surgery import Combination, Rule, Share

Tensors = Mapping[str, Tensor]
R = TypeVar("R", bound=Rule)


# Values of all the adapters' rules, read once for a whole `combine` and not at each site -----------------------


@functools.lru_cache(maxsize=4)
def largest_rank(how: Combination) -> int:
    """Returns the largest rank that any of the adapters' rules has room for."""
    rules: Sequence[Any] = how.rules
    return max(rank for rule in rules for rank in (_room(rule), *(getattr(rule, "rank_pattern", None) or {}).values()))


def _room(rule: Any) -> int:
    return getattr(rule, "max_rank", None) or rule.rank


@functools.lru_cache(maxsize=16)
def all_agree(how: Combination, name: str) -> bool:
    """Whether a field has one value in all the adapters' rules."""
    first = getattr(how.rules[0], name)
    return all(getattr(rule, name) == first for rule in how.rules)


# Low rank -----------------------------------------------------------------------------------------------------


def factors(
    how: Combination,
    shares: Sequence[Share],
    scales: Sequence[float],
    ups: Sequence[Tensor],
    downs: Sequence[Tensor],
    rank: int,
    deltas: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the factors (…, out, rank), (…, rank, in) of Σ weight · scale · up @ down, combined as `how` says.

    `deltas`: matrices (…, out, in) with their scale, if they are not products of the factors alone.
    """
    amounts = [share.weight * scale for share, scale in zip(shares, scales, strict=True)]
    if how.method == "cat":
        down = torch.cat([down * amount for down, amount in zip(downs, amounts, strict=True)], -2)
        up, lacking = torch.cat(list(ups), -1), rank - down.shape[-2]
        return torch.nn.functional.pad(up, (0, lacking)), torch.nn.functional.pad(down, (0, 0, 0, lacking))
    if not how.by_matrix:
        roots = [math.sqrt(abs(amount)) for amount in amounts]
        down = how.sum(downs, [math.copysign(root, amount) for root, amount in zip(roots, amounts, strict=True)])
        return how.sum(ups, roots), down
    if how.method == "svd" and deltas is None:
        down = torch.cat([down * amount for down, amount in zip(downs, amounts, strict=True)], -2)
        return how.largest_of_product(torch.cat(list(ups), -1), down, rank)
    if deltas is None:
        wide = [torch.promote_types(up.dtype, torch.float32) for up in ups]
        terms = zip(ups, downs, scales, wide, strict=True)
        deltas = [up.to(dtype) @ down.to(dtype) * scale for up, down, scale, dtype in terms]
    return how.largest(how.sum(deltas, [share.weight for share in shares]), rank)


def rank_of(how: Combination, shares: Sequence[Share], ranks_here: Sequence[int], most: int) -> int:
    """Returns the result's rank at a site. `ranks_here`: the adapters' ranks there; `most`: the largest at any site."""
    if how.whole:
        return sum(ranks_here)
    if how.by_matrix:
        return how.rank or most
    if len(set(ranks_here)) > 1:
        ranks = ", ".join(f"{rank} in {share.adapter!r}" for rank, share in zip(ranks_here, shares, strict=True))
        raise how.refusal(
            shares, f"it needs equal ranks, and they are {ranks}", "method='cat', or 'svd', takes any ranks"
        )
    return ranks_here[0]


# Tensors ------------------------------------------------------------------------------------------------------


def linear_in_tensors(rule: R, shares: Sequence[Share], how: Combination, *free: str) -> tuple[R, Tensors]:
    """Sums the tensors of rules whose change is linear in them, which gives the sum of the changes.

    `free`: fields that only affect the initial values, so they may differ.
    """
    how.agree(shares, *free)
    results: dict[str, Tensor] = {}
    for name, first in shares[0].params.items():
        tensors = [share.params[name] for share in shares]
        if not isinstance(first, torch.nn.Parameter):
            if not all(torch.equal(first, other.to(first.device)) for other in tensors):
                raise how.refusal(shares, f"their {name} differs, by which the numbers have their places")
            results[name] = first
        else:
            results[name] = how.sum(tensors, [share.weight for share in shares])
    return rule, results


def average(rule: R, shares: Sequence[Share], how: Combination, *free: str) -> tuple[R, Tensors]:
    """Averages the tensors of rules without a ΔW, with method "linear" or the default."""
    if how.untouched(shares):
        return rule, shares[0].params
    if how.method != "linear" and not (how.method == "svd" and how.rank is None):
        raise how.refusal(shares, "its tensors are averaged as they are, or not at all", "method='linear'")
    how.agree(shares, *free)
    for share in shares[1:]:
        for name, tensor in shares[0].params.items():
            if share.params[name].shape != tensor.shape:
                raise how.refusal(shares, f"{name} is {tuple(tensor.shape)} and {tuple(share.params[name].shape)}")
    weights = [share.weight for share in shares]
    return rule, {name: how.sum([s.params[name] for s in shares], weights) for name in shares[0].params}


def combine_copies(base: Mapping[str, Tensor], rule: R, shares: Sequence[Share], how: Combination) -> tuple[R, Tensors]:
    """Combines copies of the base's tensors: W + Σ w (T − W). `base`: W under the names of the copies.

    Statistics, which are buffers, are averaged by the absolute weights, so that a variance stays a variance.
    """
    if how.untouched(shares):
        return rule, shares[0].params
    results: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for share in shares for name in share.params):
        weighted = [(share.weight, share.params[name]) for share in shares if name in share.params]
        weights = [weight for weight, _ in weighted]
        first = weighted[0][1]
        if isinstance(first, torch.nn.Parameter) and not _counts(first):
            old = base[name].detach()
            old = old.to(torch.promote_types(old.dtype, torch.float32))
            results[name] = old + how.sum([tensor.to(old.device, old.dtype) - old for _, tensor in weighted], weights)
        elif not _counts(first):
            sizes = [abs(weight) for weight in weights] if any(weights) else [1.0] * len(weighted)
            wide = torch.promote_types(first.dtype, torch.float32)
            parts = [t.to(wide) * (size / sum(sizes)) for size, (_, t) in zip(sizes, weighted, strict=True)]
            results[name] = torch.stack(parts).sum(0)
        else:
            results[name] = max(weighted, key=lambda pair: abs(pair[0]))[1]
    return rule, results


def _counts(tensor: Tensor) -> bool:
    """Whether a tensor contains integers or booleans."""
    return not (tensor.is_floating_point() or tensor.is_complex())
