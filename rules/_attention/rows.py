"""Prefixes of several adapters in one batch: each row's own before its keys and values, padded to one length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import SiteError
from surgery.rules._attention.prefix import is_eager, widen_bias, with_gated_prefix

# The rows of an adapter, its keys and values (heads, length, size), and its gate (heads) or None.
RowPrefix = tuple[Any, Tensor, Tensor, Tensor | None]


def with_row_prefixes(*members: RowPrefix) -> Callable[..., Any]:
    """Wraps an attention function: each row gets its own prefix, or none."""

    def attend(attention: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
               *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        batch, mask, more = len(key), attention_mask, kwargs
        keys, values = key, value
        plain = [(rows.of(batch, key.device), k, v) for rows, k, v, gate in members if gate is None]
        if plain:
            length = max(k.shape[-2] for _, k, _ in plain)
            visible = torch.zeros(batch, length, dtype=torch.bool, device=key.device)
            for rows, k, _ in plain:
                visible[rows, length - k.shape[-2] :] = True
            mask = _widen_mask(attention, module, query, key, attention_mask, visible, kwargs)
            more = widen_bias(kwargs, length)
            keys = torch.cat([_pad_rows([(rows, k) for rows, k, _ in plain], length, key), key], -2)
            values = torch.cat([_pad_rows([(rows, v) for rows, _, v in plain], length, value), value], -2)
        output, *rest = attention(module, query, keys, values, mask, *args, **more)
        for rows, before_key, before_value, gate in members:
            if gate is None:
                continue
            index = rows.of(batch, key.device)
            alone = with_gated_prefix(before_key, before_value, gate)(
                _nothing(attention, output), module, query[index], key[index], value[index], None, *args, **kwargs
            )[0]
            output = output.index_add(0, index, alone.to(output.dtype))
        return (output, *rest)

    return attend


def _nothing(attention: Any, output: Tensor) -> Callable[..., Any]:
    """Returns the attention function, with the result of its first call, to the text, which was computed already."""
    calls = []

    def call(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            return (output.new_zeros(len(query), *output.shape[1:]),)
        return attention(module, query, *args, **kwargs)

    call.__name__ = getattr(attention, "__name__", "")
    return call


def _pad_rows(parts: Sequence[tuple[Tensor, Tensor]], length: int, like: Tensor) -> Tensor:
    """Returns (batch, heads, length, size): each row's prefix at the end, with zeros before it."""
    whole = like.new_zeros(like.shape[0], like.shape[1], length, like.shape[-1])
    for rows, tensor in parts:
        padded = F.pad(tensor, (0, 0, length - tensor.shape[-2], 0)).to(like.dtype)
        whole = whole.index_copy(0, rows, padded.unsqueeze(0).expand(len(rows), -1, -1, -1))
    return whole


def _widen_mask(
    attention: Any, module: nn.Module, query: Tensor, key: Tensor, mask: Any, visible: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """Returns the mask with columns for each row's prefix. A call without a mask gets an equivalent one."""
    batch, queries, length = len(visible), query.shape[-2], key.shape[-2]
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        mask = torch.ones(1, 1, queries, length, dtype=torch.bool, device=key.device)
        if causal and queries > 1 and not is_eager(attention):
            mask = mask.tril(length - queries) if length == queries else mask.tril()
        if is_eager(attention):
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=key.device)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise SiteError(
            "prefixes can't widen this attention's mask",
            why=f"it is {type(mask).__name__}, and a tensor (batch, heads, queries, keys) was expected",
            fix='load the model with attn_implementation="sdpa" or "eager"',
        )
    columns = visible
    if mask.dim() == 4:
        columns = visible.view(batch, 1, 1, -1).expand(batch, mask.shape[1], mask.shape[2], -1)
        mask = mask.expand(batch, -1, -1, -1)
    if mask.is_floating_point():
        columns = torch.zeros(columns.shape, dtype=mask.dtype, device=mask.device).masked_fill(
            ~columns, torch.finfo(mask.dtype).min
        )
    return torch.cat([columns.to(mask.dtype), mask], -1)
