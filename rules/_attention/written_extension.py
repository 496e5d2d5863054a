"""Puts a prefix into attention that a forward writes out itself.

    scores = q kᵀ, scaled, biased and masked        prefix scores = q Pkᵀ, scaled alike, not masked
    weights = softmax(scores)                       one softmax over both
    context = dropout(weights) v                    + dropout(prefix weights) Pv

So masks, biases and other tensors with one column per key do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from surgery import Site
from surgery.rules._attention.prefix import attend_alone
from surgery.rules._attention.written_attention import FOR_THE_TEXT, WrittenAttention

__all__ = ["extend"]


def extend(site: Site, attention: WrittenAttention, key: Tensor, value: Tensor, gate: Tensor | None) -> None:
    """Adds a prefix to the attention. A prefix behind a gate has a softmax of its own."""
    if not attention.to_scores:
        at = site.at(attention.root)
        return (
            site.around(call_with_prefix, key, value, at=at)
            if gate is None
            else site.around(call_with_gated_prefix, key, value, gate, at=at)
        )
    product, *rest = attention.to_scores
    alpha = product.kwargs.get("alpha", 1.0)
    alpha = site.at(alpha) if isinstance(alpha, fx.Node) else alpha
    scores = site.apply(products, site.at(attention.query), key, alpha)
    for before, node in zip(attention.to_scores, rest, strict=False):
        scores = _repeat_on_prefix(site, attention.graph, node, before, scores)
    softmax, *rest = attention.to_context
    text_scores = site.at(attention.to_scores[-1])
    if gate is None:
        site.replace(text_scores, torch.cat([text_scores, scores], -1), only=[site.at(softmax)])
        weights = site.apply(columns_after, site.base(site.at(softmax)), text_scores, scores)
        site.replace(site.at(softmax), site.apply(columns_before, site.at(softmax), text_scores))
    else:
        weights = site.again(site.at(softmax), {attention.to_scores[-1]: scores})
    for before, node in zip(attention.to_context, rest[:-1], strict=False):
        weights = _repeat_on_prefix(site, attention.graph, node, before, weights)
    context = site.at(attention.root)
    return site.replace(context, context + site.apply(add_context, weights, value, gate))


def _repeat_on_prefix(site: Site, graph: Any, node: fx.Node, before: fx.Node, scores: Tensor) -> Tensor:
    """Repeats an operation on the scores for the prefix's scores. Masks and biases are for the text alone."""
    operation = graph.nodes[node]["operation"]
    if operation == "view":
        return site.apply(shaped_like, scores, site.at(node))
    if operation in FOR_THE_TEXT and not _shifts_all(graph, node, before):
        bias = _from_the_end(graph, node, before) if operation == "add" else None
        return scores if bias is None else site.apply(at_the_query, scores, site.at(bias))
    return site.again(site.at(node), {before: scores})


def _shifts_all(graph: Any, node: fx.Node, before: fx.Node) -> bool:
    """Whether an addition adds the same number for every key, so that it also applies to the prefix."""
    data = graph.nodes[node]
    others = [other for other in data["operands"] if isinstance(other, fx.Node) and other is not before]
    shapes = [graph.nodes[other]["shape"] for other in others]
    keys = graph.nodes[before]["shape"][-1]  # one key: a mask has one column, too
    return data["operation"] in ("add", "sub") and all(
        s is not None and s[-1:] in ((), (1,)) and keys > 1 for s in shapes
    )


def _from_the_end(graph: Any, node: fx.Node, before: fx.Node) -> fx.Node | None:
    """Returns a bias for each key that counts from the last key: the end of a longer table (MPT).

    Its value for a key depends on the number of later keys, in the same call or in a cache.
    """
    for other in graph.nodes[node]["operands"]:
        if not isinstance(other, fx.Node) or other is before or graph.nodes[other]["operation"] != "getitem":
            continue
        index, shape = graph.nodes[other]["operands"][1], graph.nodes[other]["shape"]
        last = index[-1] if isinstance(index, tuple) else index
        sliced = isinstance(last, tuple) and last[:1] == ("slice",) and last[1] not in (None, 0) and last[2] is None
        if sliced and shape is not None and shape[-2:-1] == (1,):
            return other
    return None


def at_the_query(scores: Tensor, bias: Tensor) -> Tensor:
    """Adds the bias of each query's own key to the prefix's scores: a prefix counts as the nearest position."""
    queries = scores.shape[-2]
    return scores + bias.narrow(-1, bias.shape[-1] - queries, queries).mT


def products(query: Tensor, key: Tensor, alpha: float) -> Tensor:
    """Returns the scores of the prefix: (…, heads, queries, length)."""
    scores = query @ _for_rows(key, query).mT
    return scores if alpha == 1.0 else scores * alpha


def add_context(weights: Tensor, value: Tensor, gate: Tensor | None) -> Tensor:
    """Returns the prefix's part of the context."""
    context = weights @ _for_rows(value, weights)
    return context if gate is None else context * _for_rows(gate.tanh().view(-1, 1, 1), context)


def _for_rows(tensor: Tensor, like: Tensor) -> Tensor:
    """Expands (heads, …) for activations (…, heads, positions, size) or (batch · heads, positions, size)."""
    tensor = tensor.to(like.dtype)
    return tensor if like.dim() > 3 else tensor.repeat(like.shape[0] // tensor.shape[0], 1, 1)


def columns_after(weights: Tensor, scores: Tensor, more: Tensor) -> Tensor:
    return weights[..., scores.shape[-1] : scores.shape[-1] + more.shape[-1]]


def columns_before(weights: Tensor, scores: Tensor) -> Tensor:
    return weights[..., : scores.shape[-1]]


def shaped_like(scores: Tensor, other: Tensor) -> Tensor:
    return scores.reshape(*other.shape[:-1], scores.shape[-1])


def call_with_prefix(key: Tensor, value: Tensor) -> Callable[..., Any]:
    """Wraps scaled_dot_product_attention: every query attends to the prefix."""

    def attend(attention: Any, query: Tensor, keys: Tensor, values: Tensor, attn_mask: Any = None,
               dropout_p: float = 0.0, is_causal: bool = False, **kwargs: Any) -> Tensor:  # fmt: skip
        if is_causal:  # is_causal counts from the first key, so it is wrong for a longer list of keys
            attn_mask = torch.ones(query.shape[-2], keys.shape[-2], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None:
            shape = (*attn_mask.shape[:-1], key.shape[-2])
            columns = attn_mask.new_ones(shape) if attn_mask.dtype == torch.bool else attn_mask.new_zeros(shape)
            attn_mask = torch.cat([columns, attn_mask], -1)
        keys, values = (torch.cat([_for_batch(a, b), b], -2) for a, b in ((key, keys), (value, values)))
        return attention(query, keys, values, attn_mask=attn_mask, dropout_p=dropout_p, **kwargs)

    return attend


def call_with_gated_prefix(key: Tensor, value: Tensor, gate: Tensor) -> Callable[..., Any]:
    """Wraps scaled_dot_product_attention: it adds, behind a gate, a second one to the prefix."""

    def attend(attention: Any, query: Tensor, keys: Tensor, values: Tensor, attn_mask: Any = None,
               dropout_p: float = 0.0, is_causal: bool = False, **kwargs: Any) -> Tensor:  # fmt: skip
        output = attention(query, keys, values, attn_mask, dropout_p, is_causal, **kwargs)
        if torch.compiler.is_exporting():
            branch = attend_alone(query, key, value, kwargs.get("scale")).transpose(1, 2)
        else:
            branch = attention(query, _for_batch(key, keys), _for_batch(value, values), dropout_p=dropout_p, **kwargs)
        return output + gate.tanh().to(output.dtype).view(-1, 1, 1) * branch

    return attend


def _for_batch(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.dtype).expand(like.shape[0], -1, -1, -1)
