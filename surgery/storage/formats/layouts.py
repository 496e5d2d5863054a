"""Conversions of tensors by name: how a format lays its numbers out, and permutations of output rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgery.errors import SurgeryError

__all__ = ["LAYOUTS", "ROWS", "Layout", "row_order"]


class Layout(NamedTuple):
    """From the file's layout to the intermediate form's, and back."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


def _transpose(tensor: Tensor) -> Tensor:
    if tensor.dim() != 2:
        raise SurgeryError(f"a matrix is expected, and this tensor has the shape {tuple(tensor.shape)}")
    return tensor.t().contiguous()


def _flatten_column(tensor: Tensor) -> Tensor:
    if tensor.dim() > 1 and tensor.shape[0] == 1 < tensor.numel():
        why = "it is a row: this DoRA has a magnitude for each input"
        raise SurgeryError(f"a column is expected, and this tensor has the shape {tuple(tensor.shape)}", why=why)
    return tensor.flatten()


LAYOUTS: dict[str, Layout] = {
    "": Layout(lambda tensor: tensor, lambda tensor: tensor),
    "transposed": Layout(_transpose, _transpose),
    "column": Layout(_flatten_column, lambda tensor: tensor.reshape(-1, 1)),
}


# A permutation: the configuration and the number of rows → for each of our rows, the row of theirs.
RowOrder = Callable[[Mapping[str, Any], int], Tensor]


def _swap_halves(config: Mapping[str, Any], rows: int) -> Tensor:
    return torch.arange(rows).roll(-(rows // 2))


def _swap_last_context(config: Mapping[str, Any], rows: int) -> Tensor:
    """The last block of Stable Diffusion 3 has shift and scale alone, in another order; the others have six parts."""
    heads, size = config.get("num_attention_heads"), config.get("attention_head_dim")
    if not isinstance(heads, int) or not isinstance(size, int):
        why = "the rows of the last block's norm1_context stand in another order"
        raise SurgeryError("the width of the model is not known", why=why, fix="give the base: base=")
    return _swap_halves(config, rows) if rows == 2 * heads * size else torch.arange(rows)


def _rope_pairs(heads: str) -> RowOrder:
    """transformers' rotary halves, where other programs have pairs: within each head, two halves are interleaved."""

    def order(config: Mapping[str, Any], rows: int) -> Tensor:
        count = _heads(config, heads)
        if count < 1 or rows % (2 * count):
            raise SurgeryError(
                f"{rows} rows are not {count} heads of an even size", fix="give the base that the adapter was made for"
            )
        # theirs[i] = ours[grid[i]]; what is wanted is the inverse: ours[j] = theirs[inverse[j]]
        grid = torch.arange(rows).view(count, 2, rows // count // 2).transpose(1, 2).reshape(-1)
        return torch.argsort(grid)

    return order


def _heads(config: Mapping[str, Any], name: str) -> int:
    nested = config.get("text_config")
    config = {**config, **nested} if isinstance(nested, Mapping) else config
    value = config.get(name)
    value = config.get("num_attention_heads") if value is None else value
    if not isinstance(value, int):
        why = "the format stores the rows of attention heads in another order"
        raise SurgeryError("the number of attention heads is not known", why=why, fix="give the base: base=")
    return value


ROWS: dict[str, RowOrder] = {
    "swap_halves": _swap_halves,
    "swap_last_context": _swap_last_context,
    "query_heads": _rope_pairs("num_attention_heads"),
    "key_heads": _rope_pairs("num_key_value_heads"),
}


def row_order(name: str, config: Mapping[str, Any], rows: int) -> Tensor:
    """For each of our rows, the row of theirs."""
    return ROWS[name](config, rows)
