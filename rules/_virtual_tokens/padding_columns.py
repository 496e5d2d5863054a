"""Columns of virtual tokens in a text's rows: after each row's padding on the left, directly before the text.

Attention windows, recurrent states and distances between positions count every column, also padding. After the padding,
a row has the numbers of the row alone, as with a longer text that a tokenizer pads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """The place of virtual tokens: `count` columns after `start` columns of text.

    `start`: one number for all rows, or (batch, 1) with one number per row.
    """

    count: int
    start: int | Tensor

    def insert(self, text: Tensor, columns: Tensor, dim: int) -> Tensor:
        """Returns the text with `columns` inserted. The batch is the dimension before `dim`."""
        if isinstance(self.start, int):
            if not self.start:
                return torch.cat([columns, text], dim)
            behind = text.narrow(dim, self.start, text.shape[dim] - self.start)
            return torch.cat([text.narrow(dim, 0, self.start), columns, behind], dim)
        both = torch.cat([columns, text], dim)
        at = torch.arange(both.shape[dim], device=text.device)
        source = torch.where(at < self.start, at + self.count, at - self.start)
        return _take_columns(both, torch.where(at < self.start + self.count, source, at), dim, dim - 1)

    def cut(self, text: Tensor, dim: int) -> Tensor:
        """Removes the columns of the virtual tokens. The inverse of `insert`. The batch is the first dimension."""
        left = text.shape[dim] - self.count
        if isinstance(self.start, int):
            if not self.start:
                return text.narrow(dim, self.count, left).contiguous()
            behind = text.narrow(dim, self.start + self.count, left - self.start)
            return torch.cat([text.narrow(dim, 0, self.start), behind], dim)
        at = torch.arange(left, device=text.device)
        return _take_columns(text, torch.where(at < self.start, at, at + self.count), dim, 0)

    def numbered(self, positions: Tensor, after: int, by: int | Tensor, steps: Tensor, seen: int = 0) -> Tensor:
        """Returns positions: virtual tokens get the first ones, and the text those `by` later.

        `after`: how many of a row's tokens stand before them; `steps`: the virtual tokens' numbers, (count) or (batch,
        count); `by`: a number or (batch, 1); `seen`: how many columns of the text earlier calls had.
        """
        dim, start = positions.dim() - 1, self.start
        if isinstance(start, int) and isinstance(by, int):
            least = positions[..., start - 1 : start] + 1 if start else positions.amin(-1, keepdim=True)
            later = torch.cat([positions[..., :start], positions[..., start:] + by], -1) if start else positions + by
            return self.insert(later, (least + steps).expand(*later.shape[:-1], -1), dim)
        rows = max(bound.shape[0] for bound in (by, start) if isinstance(bound, Tensor))
        start = start - seen if isinstance(start, Tensor) else positions.new_full((rows, 1), start)
        before = (start - 1 if after else start).clamp(0, positions.shape[-1] - 1)
        least = _take_columns(positions, before.expand(rows, 1), dim, dim - 1) + bool(after)
        at = torch.arange(positions.shape[-1], device=positions.device)
        later = torch.where(at < start, positions, positions + by)
        return Place(self.count, start.clamp_min(0)).insert(later, (least + steps).expand(*later.shape[:-1], -1), dim)


def place_of(mask: Tensor | None, count: int, after: int, first: int | None = None) -> Place:
    """Returns the place of virtual tokens in a text with this mask: after its padding on the left and `after` tokens.

    `first`: the number of columns in the text's first call. The virtual tokens can't stand after them.
    """
    if mask is None or not (torch.compiler.is_compiling() or padded_left(mask)):
        return Place(count, after)
    start = padding_of(mask) + after
    return Place(count, start if first is None else start.clamp_max(first))


def padded_left(mask: Tensor) -> bool:
    return bool((mask[:, 0] == 0).any())


def padding_of(mask: Tensor) -> Tensor:
    """Returns the number of padding columns at the start of each row, (batch, 1)."""
    return ((mask != 0).cumsum(1) == 0).sum(1, keepdim=True)


def _take_columns(tensor: Tensor, columns: Tensor, dim: int, batch: int) -> Tensor:
    """Returns these columns of each row, (rows, columns)."""
    shape = [1] * tensor.dim()
    shape[batch], shape[dim] = columns.shape
    whole = [columns.shape[0] if i == batch else size for i, size in enumerate(tensor.shape)]
    tensor = tensor.expand(whole)
    whole[dim] = columns.shape[1]
    return tensor.gather(dim, columns.reshape(shape).expand(whole))
