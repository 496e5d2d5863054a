"""Attention written out becomes `F.scaled_dot_product_attention`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from surgery import ANY, Const, maybe, one_of
from surgery.rules._rewriting.match import RewriteMatch
from surgery.rules.rewrite import RewriteRule
from surgery.rules.rewrites._conditions import dropout_rate, is_broadcast, name_of_call

__all__ = ["attention", "attention_without_weights", "attention_written_out", "fuse_attention", "is_attention"]


def fuse_attention(targets: Any = (), *, weights: bool = True, **fields: Any) -> RewriteRule:
    """Attention written out becomes `F.scaled_dot_product_attention`.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules.rewrites import fuse_attention
    >>> class Attention(nn.Module):
    ...     def forward(self, q, k, v, mask):
    ...         return torch.softmax(q @ k.transpose(-1, -2) / 2.0 + mask, dim=-1) @ v
    >>> model, x, mask = Attention(), torch.randn(2, 5, 4), torch.randn(5, 5)
    >>> before = model(x, x, x, mask)
    >>> _ = apply_rules(model, fuse_attention(), example_inputs=(x, x, x, mask))
    >>> torch.allclose(model(x, x, x, mask), before, atol=1e-6)
    True

    It fits scores with a factor or a divisor, with up to two added terms (a mask, a bias of positions), and with
    `masked_fill` or `where`. A causal mask that the forward makes by `ones(…).triu(1)` or `tril` becomes
    `is_causal=True`. Heads of keys and values that are repeated for groups of query heads become `enable_gqa=True`.
    A dropout of the weights becomes `dropout_p`, in training alone. Softmax in float32 is what the function does in
    half precision, so only the last bits differ. A row whose keys are all hidden by -inf gives 0 and not NaN.

    Args:
        targets: Where the rule goes; default: everywhere.
        weights: What becomes of attention weights that the forward returns beside the output, as transformers' do.
            True: they are computed as before, for the caller, and so the scores are computed twice. False: the
            forward returns None for them, as the attention of transformers' sdpa does.
        **fields: Further fields of `RewriteRule`.

    Source: Dao et al. 2022, arXiv:2205.14135; the function is torch's.
    """
    fields = {"where": is_attention, "omits": not weights, **fields}
    replacement = attention if weights else attention_without_weights
    fields = {**fields, "omits": True} if not weights else fields
    return RewriteRule(targets, pattern=attention_written_out, replacement=replacement, **fields)


def attention_written_out(
    q: Any, k: Any, v: Any, keys_in_columns: Any, few_k: Any, few_v: Any, factor: Any, denominator: Any,
    bias: Any, mask: Any, hidden: Any, visible: Any, scale: Any = Const(), divisor: Any = Const(),
    fill: Any = Const(),
) -> Any:  # fmt: skip
    def mixed(keys: Any, values: Any) -> Any:
        scores = one_of(q @ keys.mT, q @ keys_in_columns)
        scores = one_of(scores * scale, scores / divisor, scores * factor, scores / denominator, scores)
        scores = maybe(maybe(scores + bias) + mask)
        wheres = torch.where(hidden, fill, scores), torch.where(visible, scores, fill)
        return torch.softmax(one_of(scores.masked_fill(hidden, fill), *wheres, scores), -1) @ values

    return one_of(mixed(_repeated(few_k), _repeated(few_v)), mixed(k, v))


def _repeated(x: Any) -> Any:
    """The heads of keys or values, each repeated for a group of query heads."""
    inserted = one_of(x[:, :, None, :, :], x[:, :, None], x.unsqueeze(2))
    expanded = inserted.expand(ANY, ANY, ANY, ANY, ANY)
    return one_of(expanded.reshape(ANY, ANY, ANY, ANY), expanded.flatten(1, 2), x.repeat_interleave(ANY, 1))


def is_attention(match: RewriteMatch) -> bool:
    """Whether the function computes it: known shapes of one rank, and masks that are not larger than the scores."""
    names = ("few_k", "few_v") if match["few_k"] is not None else ("k", "v")
    if match["keys_in_columns"] is not None:
        names = ("keys_in_columns", *names[1:])
    shapes = [match.shape(name) for name in ("q", *names)]
    if any(shape is None for shape in shapes) or dropout_rate(match, "softmax") is None:
        return False
    q, k, v = (tuple(shape or ()) for shape in shapes)
    keys = k[-1] if match["keys_in_columns"] is not None else k[-2]
    if not 3 <= len(q) == len(k) == len(v) or k[:-2] != v[:-2] or match["few_k"] is None and q[:-2] != k[:-2]:
        return False
    terms = [name for name in ("bias", "mask", "hidden", "visible") if match[name] is not None]
    fits = all(is_broadcast(match.shape(name), (*q[:-1], keys)) for name in terms if not match.is_constant(name))
    factors = [name for name in ("factor", "denominator") if match[name] is not None]
    return fits and all(is_broadcast(match.shape(name), (*q[:-1], 1)) for name in factors)


def attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, keys_in_columns: Tensor | None, few_k: Tensor | None,
    few_v: Tensor | None, factor: Tensor | None, denominator: Tensor | None, scale: float | None,
    divisor: float | None, match: RewriteMatch,
) -> Tensor:  # fmt: skip
    q = q * factor if factor is not None else q / denominator if denominator is not None else q
    scale = scale if scale is not None else 1.0 if divisor is None else 1 / divisor
    k = few_k if few_k is not None else keys_in_columns.mT if keys_in_columns is not None else k
    values = v if few_v is None else few_v
    options: dict[str, Any] = {"dropout_p": dropout_rate(match, "softmax"), "scale": scale}
    if _is_causal(match):
        options["is_causal"] = True
    else:
        options["attn_mask"] = _mask(match)
    if few_v is not None:
        options["enable_gqa"] = True
    return F.scaled_dot_product_attention(q, k, values, **options)  # type: ignore[arg-type]


def attention_without_weights(match: RewriteMatch) -> Any:
    for value in match.found.shared:
        if all(user.op == "output" for user in match.site.node_of(value).users if user not in match.nodes):
            match.site.replace(value, None)
    return attention(**{name: match[name] for name in _ARGUMENTS}, match=match)


_ARGUMENTS = (
    "q", "k", "v", "keys_in_columns", "few_k", "few_v", "factor", "denominator", "scale", "divisor"
)  # fmt: skip


def _mask(match: RewriteMatch) -> Any:
    """Returns the sum of what is added to the scores, in the dtype of the queries; None without any."""
    bias, mask, fill = match["bias"], match["mask"], match["fill"]
    total = bias if mask is None else mask if bias is None else bias + mask
    q = match["q"]
    if match["hidden"] is not None or match["visible"] is not None:
        hidden = match["hidden"] if match["hidden"] is not None else ~match["visible"]
        total = q.new_zeros(()).masked_fill(hidden, fill) if total is None else total.masked_fill(hidden, fill)
    if total is None or match.dtype("q") == _dtype_of_sum(match):
        return total
    return total.to(match.dtype("q"))


def _is_causal(match: RewriteMatch) -> bool:
    """Whether the only mask is one that the forward makes: each key after the query is hidden by -inf."""
    if match["fill"] is not None:
        hidden, added = match["hidden"], [match["bias"], match["mask"]]
        endless = match["fill"] == float("-inf") and added == [None, None]
        return endless and hidden is not None and not match.is_constant("hidden") and _hides_later(match, "hidden")
    (name, *more) = [name for name in ("bias", "mask") if match[name] is not None] or [""]
    return bool(name) and not more and not match.is_constant(name) and _hides_later(match, name)


def _hides_later(match: RewriteMatch, name: str) -> bool:
    """Whether a mask is a triangle of a plain matrix: of ones where it is a condition, of -inf where it is added."""
    node, call = match.site.node_of(match[name]), None
    compared = None
    while isinstance(node, fx.Node) and (call := name_of_call(node)) in ("bool", "to", "eq", "unsqueeze", "view"):
        compared = node.args[1] if call == "eq" else compared
        node = node.args[0]  # type: ignore[assignment]
    if not isinstance(node, fx.Node) or call not in ("triu", "tril"):
        return False
    matrix, diagonal = node.args[0], (*node.args[1:], *node.kwargs.values(), 0)[0]
    kind = name_of_call(matrix) if isinstance(matrix, fx.Node) else None
    if name != "hidden":
        arguments: tuple[Any, ...] = (*matrix.args, *matrix.kwargs.values()) if isinstance(matrix, fx.Node) else ()
        full = arguments[1] if kind == "full" else None
        return isinstance(full, float) and full == float("-inf") and (call, diagonal) == ("triu", 1)
    return kind == "ones" and (call, diagonal, compared) in (("triu", 1, None), ("triu", 1, 1), ("tril", 0, 0))


def _dtype_of_sum(match: RewriteMatch) -> Any:
    dtypes = [match.dtype(name) for name in ("bias", "mask") if match[name] is not None]
    return None if not dtypes else dtypes[0] if len(dtypes) == 1 else torch.promote_types(*dtypes)
