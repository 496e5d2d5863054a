"""Indices of each adapter's rows in a batch, and functions that split and join values by rows.

A block names one adapter for each row. Inside a model the first dimension may be larger by a whole factor: `generate`
repeats rows for its beams, and some code flattens a text's tokens or an image's windows into it. The rows that come
from one row of the batch are then adjacent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError

__all__ = ["RowOwners", "RowsError", "join_rows", "take_rows"]


class RowOwners:
    """The adapter of each row, as indices into a first dimension whose size is a multiple of the number of names."""

    def __init__(self, names: Sequence[str | None]):
        self.names = tuple(names)
        self.count = len(self.names)
        self._indices: dict[tuple, Any] = {}

    def __getitem__(self, name: str) -> AdapterRows:
        return AdapterRows(self, name)

    def of(self, name: str, size: int, device: torch.device) -> Tensor:
        """The indices of an adapter's rows, in order."""
        key = (name, size, device)
        if key not in self._indices:
            self._indices[key] = self._repeated(
                [i for i, owner in enumerate(self.names) if owner == name], size, device
            )
        return self._indices[key]

    def rest(self, names: tuple[str, ...], size: int, device: torch.device) -> Tensor:
        """The indices of the rows that belong to none of these adapters."""
        key = (names, size, device)
        if key not in self._indices:
            self._indices[key] = self._repeated(
                [i for i, owner in enumerate(self.names) if owner not in names], size, device
            )
        return self._indices[key]

    def order(self, names: tuple[str, ...], size: int, device: torch.device) -> Tensor:
        """The position of each row after sorting: the rows of these adapters in order, then the remaining rows."""
        key = ("order", names, size, device)
        if key not in self._indices:
            parts = [*(self.of(name, size, device) for name in names), self.rest(names, size, device)]
            self._indices[key] = torch.cat(parts).argsort()
        return self._indices[key]

    def _repeated(self, rows: list[int], size: int, device: torch.device) -> Tensor:
        if size % self.count:
            raise SurgeryError(f"a tensor of {size} rows can't be routed", why=f"{self.count} adapters are named")
        times = size // self.count
        first = torch.tensor(rows, dtype=torch.long, device=device).unsqueeze(1) * times
        return (first + torch.arange(times, device=device)).flatten()


class RowsError(SurgeryError):
    """The rows of a site's input are not rows of the batch, so they do not have adapters."""


class AdapterRows:
    """The rows of one adapter, for a rule that defines `routed`."""

    def __init__(self, rows: RowOwners, name: str):
        self.rows, self.name = rows, name

    def of(self, size: int, device: torch.device) -> Tensor:
        """The indices of the rows in a dimension of this size."""
        return self.rows.of(self.name, size, device)


def take_rows(value: Any, rows: RowOwners, names: tuple[str, ...] | str, size: int) -> Any:
    """Select one adapter's rows of a value, or, for a tuple of names, the remaining rows. Other sizes stay whole."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] != size:
            return value
        is_one_adapter = isinstance(names, str)
        index = rows.of(names, size, value.device) if is_one_adapter else rows.rest(names, size, value.device)  # type: ignore[arg-type]
        return value.index_select(0, index)
    if type(value) in (tuple, list):
        return type(value)(take_rows(item, rows, names, size) for item in value)
    if type(value) is dict:
        return {key: take_rows(item, rows, names, size) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, nn.Module)):
        return value
    raise SurgeryError(
        f"a {type(value).__name__} can't be split by rows",
        why="a rule here runs on each adapter's rows separately",
        fix="target modules that are called with tensors, or use one adapter for all rows",
    )


def join_rows(parts: Sequence[Any], rows: RowOwners, names: tuple[str, ...], where: str | None = None) -> Any:
    """Join the values of each adapter's rows, and of the remaining rows last, into a value of all rows.

    `where`: the site's path, for errors.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        size = sum(part.shape[0] if part.dim() else 1 for part in parts)
        shapes = [tuple(part.shape) for part in parts]
        if first.dim() == 0 or size % rows.count:
            raise RowsError(
                "a module's outputs can't be joined by rows",
                where=where,
                why=f"adapters of one batch give {' and '.join(map(str, shapes))}",
                fix="route adapters of modules whose outputs have the rows of the batch first",
            )
        if len({shape[1:] for shape in shapes}) > 1:
            raise RowsError(
                "adapters of one batch give rows of different shapes",
                where=where,
                why=" and ".join(map(str, shapes)),
                fix="route these adapters in separate batches",
            )
        return torch.cat(list(parts)).index_select(0, rows.order(names, size, first.device))
    if isinstance(first, (tuple, list)):
        items = [join_rows(column, rows, names, where) for column in zip(*parts, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if isinstance(first, Mapping):
        values = {key: join_rows([part[key] for part in parts], rows, names, where) for key in first}
        return values if type(first) is dict else type(first)(**values)  # type: ignore[call-arg]
    return first
