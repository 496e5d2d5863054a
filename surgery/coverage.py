"""Which module classes of a model can be held as graphs, and why the others can't: over the modules a call reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from surgery.errors import TraceError
from surgery.example import observe
from surgery.guided import traced
from surgery.match import base_modules
from surgery.table import table

__all__ = ["Coverage", "CoverageRow", "coverage"]


class CoverageRow(NamedTuple):
    """One module class: the first path it has, its name, and whether its graph gives the forward's bits."""

    path: str
    type: str
    status: Literal["equal", "refused"]
    reason: str


@dataclass(frozen=True)
class Coverage:
    """A row for each distinct module class that the call reaches. Prints as a table, with rich as a coloured one."""

    rows: tuple[CoverageRow, ...]

    @property
    def equal_share(self) -> float:
        """The share of classes held as graphs, from 0 to 1; 1 where the call reaches none."""
        return sum(row.status == "equal" for row in self.rows) / len(self.rows) if self.rows else 1.0

    def __str__(self) -> str:
        cells = [[row.path or "(model)", row.type, row.status, row.reason] for row in self.rows]
        return f"{self._told()}\n{table(_HEAD, cells)}"

    def __rich__(self) -> Any:
        from rich.table import Table

        shown = Table(title=self._told())
        for name in _HEAD:
            shown.add_column(name)
        for path, kind, status, reason in self.rows:
            shown.add_row(path or "(model)", kind, status, reason, style="red" if status == "refused" else None)
        return shown

    def _told(self) -> str:
        equal = sum(row.status == "equal" for row in self.rows)
        return f"{equal} of {len(self.rows)} module classes are held as graphs"


_HEAD = ["path", "type", "status", "reason"]


def coverage(model: nn.Module, example_inputs: Any) -> Coverage:
    """Trace one module of every class that a call of the model reaches, and compare each graph with its forward.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import coverage
    >>> class Picky(nn.Module):
    ...     def forward(self, x):
    ...         return x if x.sum() > 0 else -x
    >>> found = coverage(nn.Sequential(nn.Linear(4, 4), Picky()), torch.randn(2, 4))
    >>> [(row.type, row.status) for row in found.rows], round(found.equal_share, 2)
    ([('Sequential', 'equal'), ('Linear', 'equal'), ('Picky', 'refused')], 0.67)

    "equal" means: in the model's present mode the graph has the forward's bits on the module's own part of the call,
    and leaves its arguments (a KV cache) in the same state. "refused" comes with its reason. There is no third: a
    graph that differs is refused. The model is untouched. Raises `SurgeryError` where the call itself fails.
    """
    first: dict[type[nn.Module], tuple[str, nn.Module]] = {}
    for path, module in base_modules(model):
        first.setdefault(getattr(module, "_surgery_base", type(module)), (path, module))
    seen = observe(model, example_inputs, [module for _, module in first.values()])
    return Coverage(
        tuple(_row(path, kind, module, seen) for kind, (path, module) in first.items() if seen.reached(module))
    )


def _row(path: str, kind: type[nn.Module], module: nn.Module, seen: Any) -> CoverageRow:
    args, kwargs, _ = seen.calls[id(module)]
    try:
        with torch.no_grad():
            traced(module, args, kwargs)
    except TraceError as error:
        where = "" if error.where is None else f" ({error.where})"
        return CoverageRow(path, kind.__name__, "refused", f"{error.why}{where}")
    return CoverageRow(path, kind.__name__, "equal", "")
