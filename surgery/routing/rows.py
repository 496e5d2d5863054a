"""The rows of a batch, as routing sees them: which belong to which adapter, and values taken apart and joined by them.

A routing names one adapter a row. Inside a model the first dimension may be larger by a whole factor: `generate`
repeats rows for its beams, and code flattens a text's tokens or an image's windows into it. The rows of one are then
neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError

__all__ = ["RowOwners", "joined", "taken"]


class RowOwners:
    """Which rows are whose: indices into a first dimension of any multiple of the number of names."""

    def __init__(self, names: Sequence[str | None]):
        self.names = tuple(names)
        self.count = len(self.names)
        self._known: dict[tuple, Any] = {}

    def __getitem__(self, name: str) -> _Of:
        return _Of(self, name)

    def of(self, name: str, size: int, device: torch.device) -> Tensor:
        """The indices of an adapter's rows, in order."""
        key = (name, size, device)
        if key not in self._known:
            self._known[key] = self._repeated([i for i, one in enumerate(self.names) if one == name], size, device)
        return self._known[key]

    def rest(self, names: tuple[str, ...], size: int, device: torch.device) -> Tensor:
        """The indices of the rows of none of these."""
        key = (names, size, device)
        if key not in self._known:
            self._known[key] = self._repeated([i for i, one in enumerate(self.names) if one not in names], size, device)
        return self._known[key]

    def order(self, names: tuple[str, ...], size: int, device: torch.device) -> Tensor:
        """Where each row is when those of these adapters are put one after the other, and then the rest."""
        key = ("order", names, size, device)
        if key not in self._known:
            parts = [*(self.of(name, size, device) for name in names), self.rest(names, size, device)]
            self._known[key] = torch.cat(parts).argsort()
        return self._known[key]

    def _repeated(self, rows: list[int], size: int, device: torch.device) -> Tensor:
        if size % self.count:
            raise SurgeryError(f"a tensor of {size} rows can't be routed", why=f"{self.count} adapters are named")
        times = size // self.count
        first = torch.tensor(rows, dtype=torch.long, device=device).unsqueeze(1) * times
        return (first + torch.arange(times, device=device)).flatten()


class _Of:
    """The rows of one adapter, as a rule that routes itself sees them."""

    def __init__(self, rows: RowOwners, name: str):
        self.rows, self.name = rows, name

    def of(self, size: int, device: torch.device) -> Tensor:
        """Their indices in a dimension of this size."""
        return self.rows.of(self.name, size, device)


def taken(value: Any, rows: RowOwners, names: tuple[str, ...] | str, size: int) -> Any:
    """A value's rows of one adapter (or, for a tuple of names, of none of them), wherever its size is the batch's."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] != size:
            return value
        one = isinstance(names, str)
        index = rows.of(names, size, value.device) if one else rows.rest(names, size, value.device)  # type: ignore[arg-type]
        return value.index_select(0, index)
    if type(value) in (tuple, list):
        return type(value)(taken(item, rows, names, size) for item in value)
    if type(value) is dict:
        return {key: taken(item, rows, names, size) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, nn.Module)):
        return value
    raise SurgeryError(
        f"a {type(value).__name__} can't be split by rows",
        why="a rule here runs on each adapter's rows by themselves",
        fix="target modules that are called with tensors, or use one adapter for all rows",
    )


def joined(parts: Sequence[Any], rows: RowOwners, names: tuple[str, ...]) -> Any:
    """A value of all rows, from those of each adapter's rows and the rest's, in this order."""
    first = parts[0]
    if isinstance(first, Tensor):
        size = sum(part.shape[0] if part.dim() else 1 for part in parts)
        shapes = [tuple(part.shape) for part in parts]
        if first.dim() == 0 or size % rows.count:
            raise SurgeryError(
                "what a module returns can't be put together by rows",
                why=f"adapters of one batch give {' and '.join(map(str, shapes))}",
                fix="route adapters of a module whose output has a row for each of the batch",
            )
        if len({shape[1:] for shape in shapes}) > 1:
            raise SurgeryError(
                "adapters of one batch give rows of different shapes",
                why=" and ".join(map(str, shapes)),
                fix="route such adapters in batches of their own",
            )
        return torch.cat(list(parts)).index_select(0, rows.order(names, size, first.device))
    if isinstance(first, (tuple, list)):
        items = [joined(column, rows, names) for column in zip(*parts, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if isinstance(first, Mapping):
        found = {key: joined([part[key] for part in parts], rows, names) for key in first}
        return found if type(first) is dict else type(first)(**found)  # type: ignore[call-arg]
    return first
