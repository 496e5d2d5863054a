"""Attention written out becomes `F.scaled_dot_product_attention`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from surgery import ANY, Const, maybe, one_of
from surgery.rules._rewriting.match import RewriteMatch
from surgery.rules.rewrite import RewriteRule
from surgery.rules.rewrites._conditions import dropout_rate, name_of_call
from surgery.rules.rewrites._scores import HIDING, Scores, attention_objection, fill_value

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

    It fits scores with factors and divisors, with up to two added terms (a mask, a bias of positions), with
    `masked_fill` or `where`, and in another shape for the masks, such as the heads of a batch apart. A causal mask
    that the forward makes by `ones(…).triu(1)` or `tril` becomes `is_causal=True`. Heads of keys and values that are
    repeated for groups of query heads become `enable_gqa=True`. A dropout of the weights becomes `dropout_p`, in
    training alone: the module's rate or the function's argument, read at each call. Softmax in float32 is what the
    function does in half precision, so only the last bits differ.

    A row whose keys are all hidden by -inf gives 0 and not NaN. If they are hidden by a number, its weights are those
    of the scores without the mask, and not equal ones.

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
    early_hidden: Any, early_visible: Any, early_fill: Any, bias: Any, late_factor: Any, late_denominator: Any,
    mask: Any, floor: Any, hidden: Any, visible: Any, fill: Any, scale: Any = Const(), divisor: Any = Const(),
    late_scale: Any = Const(), late_divisor: Any = Const(),
) -> Any:  # fmt: skip
    def mixed(keys: Any, values: Any) -> Any:
        scores = one_of(q @ keys.mT, q @ keys_in_columns)
        scores = one_of(scores * scale, scores / divisor, scores * factor, scores / denominator, scores)
        scores = _filled(_viewed(scores), early_hidden, early_visible, early_fill)
        scores = maybe(scores + bias)
        late = scores * late_scale, scores / late_divisor, scores * late_factor, scores / late_denominator
        scores = maybe(_viewed(one_of(*late, scores)) + mask)
        scores = _filled(_viewed(maybe(torch.maximum(scores, floor))), hidden, visible, fill)
        return _viewed(_viewed(torch.softmax(_viewed(scores), -1))) @ values

    return one_of(mixed(_repeated(few_k), _repeated(few_v)), mixed(k, v))


def _viewed(x: Any) -> Any:
    """In another shape, or not."""
    sizes = (ANY,) * 3, (ANY,) * 4, (ANY,) * 5
    return one_of(x, *[x.view(*size) for size in sizes], x.view(ANY))


def _filled(scores: Any, hidden: Any, visible: Any, fill: Any) -> Any:
    wheres = torch.where(hidden, fill, scores), torch.where(visible, scores, fill)
    return one_of(scores.masked_fill(hidden, fill), *wheres, scores)


def _repeated(x: Any) -> Any:
    """The heads of keys or values, each repeated for a group of query heads."""
    inserted = one_of(x[:, :, None, :, :], x[:, :, None], x.unsqueeze(2))
    expanded = inserted.expand(ANY, ANY, ANY, ANY, ANY)
    return one_of(expanded.reshape(ANY, ANY, ANY, ANY), expanded.flatten(1, 2), x.repeat_interleave(ANY, 1))


def is_attention(match: RewriteMatch) -> bool | str:
    """Whether the function computes it; if not, the reason."""
    return attention_objection(match) or True


def attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, keys_in_columns: Tensor | None, few_k: Tensor | None,
    few_v: Tensor | None, match: RewriteMatch,
) -> Tensor:  # fmt: skip
    scores = Scores(match)
    keys: Any = few_k if few_k is not None else keys_in_columns.mT if keys_in_columns is not None else k
    values: Any = v if few_v is None else few_v
    q, scale = scores.scaled(q)
    options: dict[str, Any] = {"dropout_p": dropout_rate(match, "softmax"), "scale": scale}
    if _is_causal(match):
        options["is_causal"] = True
    else:
        options["attn_mask"] = scores.mask()
    if few_v is not None:
        options["enable_gqa"] = True
    value_name = "v" if few_v is None else "few_v"
    half_values = match.dtype(value_name) != match.dtype("q")  # the forward computes the scores in float32
    moved = scores.moved(values.to(match.dtype("q")) if half_values else values, value_name)
    result = F.scaled_dot_product_attention(scores.moved(q, "q"), scores.moved(keys, "q"), moved, **options)
    result = scores.moved_back(result, values, value_name)
    return result.to(match.result_dtype) if half_values else result


def attention_without_weights(match: RewriteMatch) -> Any:
    for value in match.found.shared:
        if all(user.op == "output" for user in match.site.node_of(value).users if user not in match.nodes):
            match.site.replace(value, None)
    return attention(**{name: match[name] for name in _ARGUMENTS}, match=match)


_ARGUMENTS = ("q", "k", "v", "keys_in_columns", "few_k", "few_v")


def _is_causal(match: RewriteMatch) -> bool:
    """Whether the only mask is one that the forward makes: each key after the query is hidden by -inf."""
    terms = [name for name in (*HIDING, "bias", "mask") if match[name] is not None]
    if len(terms) != 1 or match.is_constant(terms[0]) or terms[0] in ("early_visible", "visible"):
        return False
    fill = next((match[name] for name in ("fill", "early_fill") if match[name] is not None), None)
    if fill is not None and fill_value(match, fill) != float("-inf"):
        return False
    return _hides_later(match, terms[0])


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
    if name in ("bias", "mask"):
        arguments: tuple[Any, ...] = (*matrix.args, *matrix.kwargs.values()) if isinstance(matrix, fx.Node) else ()
        full = arguments[1] if kind == "full" else None
        return isinstance(full, float) and full == float("-inf") and (call, diagonal) == ("triu", 1)
    return kind == "ones" and (call, diagonal, compared) in (("triu", 1, None), ("triu", 1, 1), ("tril", 0, 0))
