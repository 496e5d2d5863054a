"""The keys and values of a prefix, and how attention functions attend to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery import LiveSite, Site, SiteError

PROJECTION = ("embedding", "inner", "inner_bias", "outer", "outer_bias")


# Where keys and values come from ------------------------------------------------------------------------------


def existing_shapes(site: Site, length: int) -> list[tuple[int, ...]] | None:
    """Returns the shapes (heads, length, size) of the keys and values that the adapter has here already."""
    outer = site.shape_of("outer")
    shapes = [site.shape_of(name) if outer is None else (outer[1], length, outer[2]) for name in ("key", "value")]
    return None if shapes[0] is None else shapes  # type: ignore[return-value]


def keys_and_values(site: Site, shapes: list[tuple[int, ...]], init: str, projection: int | None) -> list[Tensor]:
    """Returns the prefix's keys and values, (heads, length, size): parameters, or the output of a trained MLP."""
    if projection is None:
        fill: Any = _normal if init == "random" else 0.0
        return [site.param(name, shape, fill) for name, shape in zip(("key", "value"), shapes, strict=True)]
    if shapes[0] != shapes[1]:
        raise SiteError(f"{site.label} has one MLP for keys and values, and they differ in size", where=site.path)
    heads, length, size = shapes[0]
    last: Any = _as_linear(projection) if init == "random" else 0.0
    pair = site.apply(
        project,
        site.param("embedding", (length, projection), nn.init.normal_),
        site.param("inner", (projection, projection), _as_linear(projection)),
        site.param("inner_bias", (projection,), _as_linear(projection)),
        site.param("outer", (2, heads, size, projection), last),
        site.param("outer_bias", (2, heads, size), last),
    )
    return [pair[0], pair[1]]


def project(embedding: Tensor, inner: Tensor, inner_bias: Tensor, outer: Tensor, outer_bias: Tensor) -> Tensor:
    """tanh(E Wᵢᵀ + bᵢ) Wₒᵀ + bₒ as keys and values: (2, heads, length, size)."""
    hidden = nn.functional.linear(embedding, inner, inner_bias).tanh()
    flat = nn.functional.linear(hidden, outer.flatten(0, 2), outer_bias.flatten())
    return flat.view(len(embedding), *outer.shape[:3]).permute(1, 2, 0, 3)


def folded_tensors(site: LiveSite) -> dict[str, Tensor]:
    """Returns an adapter's tensors at a site, with the MLP's replaced by the keys and values that it computes."""
    with torch.no_grad():
        key, value = project(*(site.params[name] for name in PROJECTION)).contiguous()
    return {**{name: tensor for name, tensor in site.params.items() if name not in PROJECTION},
            "key": key, "value": value}  # fmt: skip


def _normal(tensor: Tensor) -> None:
    nn.init.normal_(tensor, std=0.02)


def _as_linear(inputs: int) -> Callable[[Tensor], Tensor]:
    """Returns the initial values of torch's Linear, for weight and bias."""
    return partial(nn.init.uniform_, a=-(inputs**-0.5), b=inputs**-0.5)


def require_gradient(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any], Tensor]:
    """Returns the arguments with the first floating-point tensor, the hidden state, as a leaf with gradients.

    Arguments that are the same tensor stay the same tensor: queries, keys and values may be separate arguments.
    """
    activations = [
        value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point()
    ]
    if not activations:
        raise SiteError("a PrefixRule needs a module that is called with hidden states")
    leaf = activations[0].requires_grad_()

    def share_leaf(value: Any) -> Any:
        alike = isinstance(value, Tensor) and value.shape == leaf.shape and value.dtype == leaf.dtype
        return leaf if alike and torch.equal(value, leaf) else value

    return tuple(map(share_leaf, args)), {name: share_leaf(value) for name, value in kwargs.items()}, leaf


# Attending to it ----------------------------------------------------------------------------------------------

# While prefixes are fitted: the id of a prefix's own keys → the function that gets the text's keys and values.
listeners: dict[int, Callable[[Tensor, Tensor], Any]] = {}

_WORTHWHILE = 1 << 18  # entries of the keys


def record_text(before_key: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this prefix is being fitted. Then it records the text's keys and values, and has no effect."""
    take = listeners.get(id(before_key)) if listeners else None
    if take is not None:
        take(key, value)
    return take is not None


def widen_bias(kwargs: dict[str, Any], length: int) -> dict[str, Any]:
    """Returns the arguments with T5's bias of relative positions widened by zeros: a prefix has no positions."""
    bias = kwargs.get("position_bias")
    if bias is None:
        return kwargs
    return {**kwargs, "position_bias": torch.cat([bias.new_zeros(*bias.shape[:-1], length), bias], -1)}


def attend_one_query(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, before: tuple[Tensor, Tensor], kwargs: Any
) -> Tensor | None:
    """Computes sdpa of one query, as in decoding, with a prefix. None if this way is not faster or not exact.

    It concatenates the scores and not the keys and values: a cache may be a thousand times as long as a step.
    """
    if query.shape[-2] != 1 or query.dtype not in (torch.float32, torch.float64) or kwargs.get("dropout", 0.0):
        return None  # half precision: scores would be rounded, which sdpa's kernels never do
    if not torch.compiler.is_compiling() and key.numel() < _WORTHWHILE:
        return None  # copying a short cache takes less time than calling the many operations below
    if getattr(attention, "__name__", "") != "sdpa_attention_forward" or any(map(kwargs.get, ("cache", "softcap"))):
        return None
    heads, shared = key.shape[1], query.shape[1] // key.shape[1]
    scaling = kwargs.get("scaling")
    rows = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    rows = rows.reshape(-1, heads, shared, query.shape[-1])  # the queries that share a key's head, as rows
    scores = rows @ key.mT
    for added in (kwargs.get("position_bias"), mask):
        if added is not None:
            added = added if added.shape[1] == 1 else added.reshape(len(added), heads, shared, -1)
            scores = scores.masked_fill(~added, -torch.inf) if added.dtype == torch.bool else scores + added
    first, last = (tensor.to(key.dtype) for tensor in before)
    weights = torch.cat([rows @ first.mT, scores], -1).softmax(-1)
    length = first.shape[-2]
    context = weights[..., :length] @ last + weights[..., length:] @ value
    return context.reshape(len(context), -1, 1, value.shape[-1]).transpose(1, 2).contiguous()


def with_prefix(before_key: Tensor, before_value: Tensor) -> Callable[..., Any]:
    """Wraps an attention function: it gets the prefix before its keys and values."""

    def attend(attention: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
               *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        if record_text(before_key, key, value):
            return attention(module, query, key, value, attention_mask, *args, **kwargs)
        if not args:
            output = attend_one_query(attention, query, key, value, attention_mask, (before_key, before_value), kwargs)
            if output is not None:
                return output, None
        mask = _widen_mask(attention, module, query, key, attention_mask, before_key.shape[-2], kwargs)
        kwargs = widen_bias(kwargs, before_key.shape[-2])
        keys = torch.cat([_spread(before_key, key), key], -2)
        values = torch.cat([_spread(before_value, value), value], -2)
        return attention(module, query, keys, values, mask, *args, **kwargs)

    return attend


def with_gated_prefix(before_key: Tensor, before_value: Tensor, gate: Tensor) -> Callable[..., Any]:
    """Wraps an attention function: it adds, behind a gate, a second call that attends to the prefix alone."""

    def attend(attention: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
               *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        output, *rest = attention(module, query, key, value, attention_mask, *args, **kwargs)
        if record_text(before_key, key, value):
            return (output, *rest)
        if torch.compiler.is_exporting() and not any(kwargs.get(name) is not None for name in _OF_SOFTMAX):
            branch = attend_alone(query, before_key, before_value, kwargs.get("scaling")).to(output.dtype)
            return (output + gate.tanh().to(output.dtype).view(1, 1, -1, 1) * branch, *rest)
        # Every query sees the prefix: said by a mask, or a causal attention would put its own there.
        mask = torch.ones(1, 1, query.shape[-2], before_key.shape[-2], dtype=torch.bool, device=query.device)
        prefix = _spread(before_key, key), _spread(before_value, value)
        alone = {**kwargs, "position_bias": None} if "position_bias" in kwargs else kwargs  # it has no positions
        branch = attention(module, query, *prefix, None if is_eager(attention) else mask, *args, **alone)[0]
        return (output + gate.tanh().to(output.dtype).view(1, 1, -1, 1) * branch, *rest)

    return attend


_OF_SOFTMAX = ("softcap", "s_aux")  # arguments of attention functions that change the scores


def attend_alone(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Returns softmax(q kᵀ) v of a prefix alone, (batch, queries, heads, size), for a graph with any prefix length.

    The attention function is not called: it may reshape keys, and a reshape to length 0 means "unchanged" in ONNX.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shared = query.unflatten(1, (key.shape[0], -1)) * scale  # the queries of a key's head
    scores = shared @ key.to(query.dtype).unsqueeze(1).mT
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value.to(query.dtype).unsqueeze(1)).flatten(1, 2).transpose(1, 2)


def _widen_mask(
    attention: Any, module: nn.Module, query: Tensor, key: Tensor, mask: Any, length: int, kwargs: Any
) -> Any:
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if not causal or query.shape[-2] == 1 or is_eager(attention):
            return None  # every query attends to every key, also with a prefix
        # As scaled_dot_product_attention's is_causal counts, from the first key. No `tril(length)`: to an exporter its
        # diagonal is a constant, and the length of a slot is none.
        keys = torch.arange(length + key.shape[-2], device=query.device)
        return (keys <= torch.arange(query.shape[-2], device=query.device).unsqueeze(-1) + length)[None, None]
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise SiteError(
            "a prefix can't widen this attention's mask",
            why=f"it is {type(mask).__name__}, and a tensor (batch, heads, queries, keys) was expected",
            fix='load the model with attn_implementation="sdpa" or "eager"',
        )
    columns = mask.new_ones(*mask.shape[:-1], length) if mask.dtype == torch.bool or mask.dim() == 2 else None
    columns = mask.new_zeros(*mask.shape[:-1], length) if columns is None else columns
    return torch.cat([columns, mask], -1)


def is_eager(attention: Any) -> bool:
    """Whether an attention without a mask lets every query attend to every key, even if it is causal."""
    while hasattr(attention, "args") and hasattr(attention, "func"):  # other prefixes around it
        attention = attention.args[0]
    return getattr(attention, "__name__", "").startswith("eager")


def _spread(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.dtype).unsqueeze(0).expand(like.shape[0], -1, -1, -1)
