"""Which module classes of a model can be held as graphs, and why the others can't: over the modules a call reaches.

A class may be used in several ways in one call, as self- and as cross-attention or with and without a position bias:
one module is tried for each way, and a class is held only if all of them are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from surgery.errors import TraceError
from surgery.patterns.module_class import class_of
from surgery.patterns.module_walk import base_modules
from surgery.text_table import table
from surgery.tracing.example_call import call, copied
from surgery.tracing.guards import parts_of
from surgery.tracing.trace import traced

__all__ = ["Coverage", "CoverageRow", "coverage"]


class CoverageRow(NamedTuple):
    """One module class: a path it has, its name, and whether its graph gives the forward's bits.

    The path is that of the class's first module called, or of the first one refused.
    """

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
    """Trace modules of every class that a call of the model reaches, and compare each graph with its forward.

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
    graph that differs is refused. One module of a class is tried for each way in which the call uses the class (other
    arguments None, other flags, other children), up to eight, and one that is refused refuses the class. The model is
    untouched. Raises `SurgeryError` where the call itself fails.
    """
    paths = {id(module): path for path, module in reversed(list(base_modules(model)))}
    order = {class_of(module): None for _, module in base_modules(model)}
    uses = _uses(model, example_inputs)
    return Coverage(tuple(_row(kind, uses[kind], paths) for kind in order if kind in uses))


# A module, and the arguments of one call of it.
Use = tuple[nn.Module, tuple, dict[str, Any]]
_MOST = 8


def _uses(model: nn.Module, example_inputs: Any) -> dict[type[nn.Module], list[Use]]:
    """For each class, one call for each way in which it is used."""
    found: dict[type[nn.Module], list[Use]] = {}
    ways: set[Any] = set()

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kind = class_of(module)
        way = kind, parts_of(args, deep=True), parts_of(kwargs, deep=True), _kind_of(module)
        uses = found.setdefault(kind, [])
        if len(uses) < _MOST and way not in ways:
            ways.add(way)
            uses.append((module, copied(args), copied(kwargs)))

    compiled = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    inside = {id(inner) for module in compiled for inner in module.modules() if inner is not module}
    handles = []
    for _, module in base_modules(model):
        if id(module) in inside:
            continue
        if isinstance(module, torch.jit.ScriptModule):  # its calls can't be watched
            found.setdefault(class_of(module), []).append((module, (), {}))
        else:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _kind_of(module: nn.Module) -> tuple:
    """How modules of one class may differ in what their forward does: in flags and words, and in their children."""
    flags = [(name, value) for name, value in vars(module).items() if isinstance(value, (bool, str, type(None)))]
    return tuple(flags), tuple((name, type(child)) for name, child in module._modules.items() if not name.isdigit())


def _row(kind: type[nn.Module], uses: list[Use], paths: dict[int, str]) -> CoverageRow:
    for module, args, kwargs in uses:
        try:
            with torch.no_grad():
                traced(module, args, kwargs)
        except TraceError as error:
            where = "" if error.where is None else f" ({error.where})"
            return CoverageRow(paths[id(module)], kind.__name__, "refused", f"{error.why}{where}")
    return CoverageRow(paths[id(uses[0][0])], kind.__name__, "equal", "")
