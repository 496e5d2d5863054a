"""`coverage`: which module classes that a call reaches can be traced as graphs, and why the others can't.

A call may use a class in several ways: as self- and as cross-attention, with and without a position bias. One module is
traced for each way, and a class counts as equal only if all of them are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from surgery.errors import TraceError
from surgery.patterns.module_class import class_of
from surgery.patterns.module_walk import base_modules
from surgery.patterns.offload_hooks import refuse_offloaded
from surgery.results import Displayed, Report, Table
from surgery.tracing.example_call import call
from surgery.tracing.guards import parts_of
from surgery.tracing.trace import traced
from surgery.transaction.object_contents import copied

__all__ = ["Coverage", "CoverageRow", "coverage"]


class CoverageRow(NamedTuple):
    """One module class: a path, the class's name, and whether its graph gives the forward's bits.

    The path is that of the class's first module that is called, or of the first module that is refused.
    """

    path: str
    type: str
    status: Literal["equal", "refused"]
    reason: str


@dataclass(frozen=True)
class Coverage(Displayed, Report):
    """A row for each module class that the call reaches. Prints as a table; rich prints it with colours."""

    rows: tuple[CoverageRow, ...]

    @property
    def equal_share(self) -> float:
        """The share of classes that are held as graphs, from 0 to 1; 1 if the call reaches no class."""
        return sum(row.status == "equal" for row in self.rows) / len(self.rows) if self.rows else 1.0

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each class: path, type, status, reason."""
        return [row._asdict() for row in self.rows]

    def _display_parts(self) -> list[str | Table]:
        equal = sum(row.status == "equal" for row in self.rows)
        cells = [[row.path or "(model)", row.type, row.status, row.reason] for row in self.rows]
        refused = frozenset(number for number, row in enumerate(self.rows) if row.status == "refused")
        return [f"{equal} of {len(self.rows)} module classes are held as graphs", Table(_HEAD, cells, refused)]


_HEAD = ["path", "type", "status", "reason"]


def coverage(model: nn.Module, example_inputs: Any) -> Coverage:
    """Trace modules of every class that a call of the model reaches, and compare each graph with its forward.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import coverage
    >>> class Picky(nn.Module):
    ...     def forward(self, x):
    ...         return x if x.sum() > 0 else -x
    >>> report = coverage(nn.Sequential(nn.Linear(4, 4), Picky()), torch.randn(2, 4))
    >>> [(row.type, row.status) for row in report.rows], round(report.equal_share, 2)
    ([('Sequential', 'equal'), ('Linear', 'equal'), ('Picky', 'refused')], 0.67)

    "equal": in the model's present mode, the graph gives the forward's bits on the module's own arguments in the call,
    and leaves them (a KV cache) in the same state. "refused": it does not, or the forward can't be traced; the row has
    the reason. One module is traced for each way in which the call uses a class (arguments that are None, flags,
    children), up to eight. A class is refused if one of these modules is. The model does not change.

    Args:
        model: the model.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        A `Coverage` with a row for each class.

    Raises:
        SurgeryError: the call itself fails, or the model is offloaded.
    """
    refuse_offloaded(model, "the modules of an offloaded model can't be traced")
    paths = {id(module): path for path, module in reversed(list(base_modules(model)))}
    order = {class_of(module): None for _, module in base_modules(model)}
    uses = _uses(model, example_inputs)
    return Coverage(tuple(_row(kind, uses[kind], paths) for kind in order if kind in uses))


# A module, and the arguments of one call of it.
Use = tuple[nn.Module, tuple, dict[str, Any]]
_MOST = 8


def _uses(model: nn.Module, example_inputs: Any) -> dict[type[nn.Module], list[Use]]:
    """For each class, one call of a module for each way in which the class is used."""
    uses_by_class: dict[type[nn.Module], list[Use]] = {}
    ways: set[Any] = set()

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kind = class_of(module)
        way = kind, parts_of(args, deep=True), parts_of(kwargs, deep=True), _kind_of(module)
        uses = uses_by_class.setdefault(kind, [])
        if len(uses) < _MOST and way not in ways:
            ways.add(way)
            uses.append((module, copied(args), copied(kwargs)))

    compiled = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    inside = {id(inner) for module in compiled for inner in module.modules() if inner is not module}
    handles = []
    for _, module in base_modules(model):
        if id(module) in inside:
            continue
        if isinstance(module, torch.jit.ScriptModule):  # hooks do not see its calls
            uses_by_class.setdefault(class_of(module), []).append((module, (), {}))
        else:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return uses_by_class


def _kind_of(module: nn.Module) -> tuple:
    """The settings by which the forwards of modules of one class may differ: flags, words and children."""
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
