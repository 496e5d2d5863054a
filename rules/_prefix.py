"""What a prefix is made of, and how one query attends to it without a copy of what it stands before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery import LiveSite, Site, SiteError

PROJECTION = ("embedding", "inner", "inner_bias", "outer", "outer_bias")


# Where keys and values come from ------------------------------------------------------------------------------


def shape_held(site: Site, length: int) -> list[tuple[int, ...]] | None:
    """The shapes (heads, length, size) of keys and values that the adapter has here already."""
    outer = site.shape_of("outer")
    shapes = [site.shape_of(name) if outer is None else (outer[1], length, outer[2]) for name in ("key", "value")]
    return None if shapes[0] is None else shapes  # type: ignore[return-value]


def keys_and_values(site: Site, shapes: list[tuple[int, ...]], init: str, projection: int | None) -> list[Tensor]:
    """The prefix's keys and values, (heads, length, size): trained themselves, or made by a trained MLP."""
    if projection is None:
        fill: Any = _normal if init == "random" else 0.0
        return [site.param(name, shape, fill) for name, shape in zip(("key", "value"), shapes, strict=True)]
    if shapes[0] != shapes[1]:
        raise SiteError(f"{site.label} has one MLP for keys and values, and they differ in size", where=site.path)
    heads, length, size = shapes[0]
    last: Any = _as_linear(projection) if init == "random" else 0.0
    made = site.apply(
        projected,
        site.param("embedding", (length, projection), nn.init.normal_),
        site.param("inner", (projection, projection), _as_linear(projection)),
        site.param("inner_bias", (projection,), _as_linear(projection)),
        site.param("outer", (2, heads, size, projection), last),
        site.param("outer_bias", (2, heads, size), last),
    )
    return [made[0], made[1]]


def projected(embedding: Tensor, inner: Tensor, inner_bias: Tensor, outer: Tensor, outer_bias: Tensor) -> Tensor:
    """tanh(E Wᵢᵀ + bᵢ) Wₒᵀ + bₒ as keys and values: (2, heads, length, size)."""
    hidden = nn.functional.linear(embedding, inner, inner_bias).tanh()
    flat = nn.functional.linear(hidden, outer.flatten(0, 2), outer_bias.flatten())
    return flat.view(len(embedding), *outer.shape[:3]).permute(1, 2, 0, 3)


def folded_tensors(site: LiveSite) -> dict[str, Tensor]:
    """An adapter's tensors at a site, the MLP's replaced by the keys and values that it makes."""
    with torch.no_grad():
        key, value = projected(*(site.params[name] for name in PROJECTION)).contiguous()
    return {**{name: tensor for name, tensor in site.params.items() if name not in PROJECTION},
            "key": key, "value": value}  # fmt: skip


def _normal(tensor: Tensor) -> None:
    nn.init.normal_(tensor, std=0.02)


def _as_linear(inputs: int) -> Callable[[Tensor], Tensor]:
    """As torch's Linear starts, weight and bias alike."""
    return partial(nn.init.uniform_, a=-(inputs**-0.5), b=inputs**-0.5)


# Attending to it ----------------------------------------------------------------------------------------------

# While prefixes are fitted: the id of a prefix's own keys → what takes the keys and values of the text.
listeners: dict[int, Callable[[Tensor, Tensor], Any]] = {}

_WORTHWHILE = 1 << 18  # entries of the keys


def heard(before_key: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this prefix is being fitted; it then takes the text's keys and values, and is passed over."""
    take = listeners.get(id(before_key)) if listeners else None
    if take is not None:
        take(key, value)
    return take is not None


def widened_bias(kwargs: dict[str, Any], length: int) -> dict[str, Any]:
    """The arguments with a bias of relative positions (T5's) that gives the prefix none: it has no positions."""
    bias = kwargs.get("position_bias")
    if bias is None:
        return kwargs
    return {**kwargs, "position_bias": torch.cat([bias.new_zeros(*bias.shape[:-1], length), bias], -1)}


def for_one_query(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, before: tuple[Tensor, Tensor], kwargs: Any
) -> Tensor | None:
    """What sdpa gives one query, as when decoding, with a prefix; None where another way is to be taken.

    The scores are put side by side, the keys and values are not: a cache may be a thousand times as long as its step.
    """
    if query.shape[-2] != 1 or query.dtype not in (torch.float32, torch.float64) or kwargs.get("dropout", 0.0):
        return None  # half precision: scores would be rounded, which sdpa's kernels never do
    if not torch.compiler.is_compiling() and key.numel() < _WORTHWHILE:
        return None  # copying a short cache takes less time than calling the many operations below
    if getattr(attention, "__name__", "") != "sdpa_attention_forward" or any(map(kwargs.get, ("cache", "softcap"))):
        return None
    heads, shared = key.shape[1], query.shape[1] // key.shape[1]
    scaling = kwargs.get("scaling")
    one = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    one = one.reshape(-1, heads, shared, query.shape[-1])  # the queries that share a key's head, as rows
    scores = one @ key.mT
    for added in (kwargs.get("position_bias"), mask):
        if added is not None:
            added = added if added.shape[1] == 1 else added.reshape(len(added), heads, shared, -1)
            scores = scores.masked_fill(~added, -torch.inf) if added.dtype == torch.bool else scores + added
    first, last = (tensor.to(key.dtype) for tensor in before)
    weights = torch.cat([one @ first.mT, scores], -1).softmax(-1)
    length = first.shape[-2]
    found = weights[..., :length] @ last + weights[..., length:] @ value
    return found.reshape(len(found), -1, 1, value.shape[-1]).transpose(1, 2).contiguous()
