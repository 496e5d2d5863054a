"""Checks that the rows of a batch come first in a module's input, if its shape alone does not show it.

A pooled vector for each row has the shape of a token for each row of an expert; (batch, positions) has the shape of
(positions, batch) if the sizes are equal. So a few rows run in two orders: two rows of the batch and rows made from
them. If a module's input is reordered in the same way, in equal parts, the rows come first in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery.complex_numbers import is_number
from surgery.routing.rows import RowsError
from surgery.routing.thread_state import paused
from surgery.state.records import site_state
from surgery.tracing.state_restoration import restore_state
from surgery.transaction.object_contents import copied

__all__ = ["check_rows_first"]

Arguments = tuple[tuple, dict[str, Any]]
_ROWS = 4  # rows in a run
_COLUMNS = 64  # compared numbers of each row
_SEVERAL = 0  # one row of the batch gives several rows, such as its tokens or windows


def check_rows_first(
    model: nn.Module,
    modules: Sequence[nn.Module],
    module: nn.Module,
    shape: tuple[int, ...],
    batch: int,
    arguments: Any,
) -> None:
    """Raise `SurgeryError` unless a batch's rows come first in a module's input, each with an equal number of entries.

    `arguments`: the model's own arguments in the running call. Whether one row of the batch gives one row or several is
    a property of the code. It is stored for all `modules`, by the number of dimensions of their inputs.
    """
    site = site_state(module)
    assert site is not None
    multiple: int | str | None = site.layouts.get(len(shape))
    if multiple == _SEVERAL:
        return
    if multiple is None or multiple * batch != shape[0]:
        multiple = _observe_rows(model, modules, module, len(shape), batch, arguments)
    if isinstance(multiple, int) and multiple * batch != shape[0]:
        multiple = f"{_ROWS} rows alone make {_ROWS * multiple} of them"
    if any(part.startswith("expert") for part in site.path.split(".")[:-1]):
        multiple = "a router sends experts some of the tokens"
    if isinstance(multiple, str):
        raise RowsError(
            "the adapters of the rows in a module's input are unknown",
            where=site.path,
            why=f"they are {shape} for a batch of {batch}, and {multiple}",
            fix="exclude the module from the adapters; or, if the batch's rows come first there, route(…, check=False)",
        )
    site.layouts[len(shape)] = 1 if multiple == 1 else _SEVERAL


def _observe_rows(
    model: nn.Module, modules: Sequence[nn.Module], module: nn.Module, dim: int, batch: int, arguments: Arguments | None
) -> int | str:
    """Run some rows in two orders; return how many rows of the module's input one row of the batch gives."""
    if arguments is None:
        return "no call of the model itself is running"
    try:
        in_order, reordered = _some_rows(arguments, batch)
        with paused(), torch.no_grad(), _evaluating(model):
            first, second = (_record_inputs(model, modules, rows) for rows in (in_order, reordered))
    except Exception as error:  # the model's own code, which may not support this batch
        return f"the model can't be run on {_ROWS} rows ({type(error).__name__}: {error})"
    answer: int | str = f"{_ROWS} rows don't reach it"
    for inner in modules:
        site = site_state(inner)
        assert site is not None
        calls = list(zip(first.get(id(inner), ()), second.get(id(inner), ()), strict=False))
        if len(first.get(id(inner), ())) != len(second.get(id(inner), ())):
            calls = []
        for dims in {dims for (dims, _), _ in calls}:
            multiples = {_rows_per_part(a, b) for (d, a), (_, b) in calls if d == dims}
            multiple = multiples.pop() if len(multiples) == 1 else "they are not the same in all calls of the module"
            if isinstance(multiple, int) and inner is not module:
                site.layouts.setdefault(dims, multiple)
            if inner is module and dims == dim:
                answer = multiple
    return answer


def _rows_per_part(in_order: Tensor, reordered: Tensor) -> int | str:
    """The rows in each part if `reordered` has the parts of `in_order` with the last one first; otherwise a reason."""
    part, remainder = divmod(len(in_order), _ROWS)
    if in_order.shape != reordered.shape or remainder or not part:
        return "rows in another order make inputs of other shapes"
    near = 1e-3 * max(1e-6, float(in_order.abs().max()))
    if not torch.allclose(reordered, in_order.roll(part, 0), rtol=0.0, atol=near):
        return "the rows of the batch don't come first in it"
    if torch.allclose(in_order, in_order.roll(part, 0), rtol=0.0, atol=near):
        return "all rows look alike there"
    return part


def _record_inputs(
    model: nn.Module, modules: Sequence[nn.Module], arguments: Arguments
) -> dict[int, list[tuple[int, Tensor]]]:
    """A few numbers of each row of each module's input, for all calls."""
    inputs: dict[int, list[tuple[int, Tensor]]] = {}
    me = threading.get_ident()

    def enter(module: nn.Module, args: tuple, kwargs: Any = None) -> None:
        # Another thread may call the hook before torch has noted that it takes keywords.
        value = next((v for v in (*args, *(kwargs or {}).values()) if isinstance(v, Tensor) and v.dim()), None)
        if value is not None and threading.get_ident() == me:
            flat = value.detach().reshape(len(value), -1) if value.numel() else value.reshape(len(value), 0)
            step = max(1, flat.shape[1] // _COLUMNS)
            inputs.setdefault(id(module), []).append((value.dim(), _wide(flat[:, ::step]).cpu()))

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
    try:
        with restore_state(model):  # so both runs start from the same state
            model(*copied(arguments[0]), **copied(arguments[1]))
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.complex128) if value.is_complex() else value.double()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block, all modules are in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _some_rows(arguments: Arguments, batch: int) -> tuple[Arguments, Arguments]:
    """The arguments with `_ROWS` rows, in order and with the last row first; without caches."""
    draw = torch.Generator().manual_seed(0)  # not torch's generator: other threads draw from it
    rows_by_id: dict[int, tuple[Tensor, Tensor]] = {}

    def chosen(value: Tensor, run: int) -> Tensor:
        if not value.dim() or len(value) != batch:
            return value
        if id(value) not in rows_by_id:
            first, last = value[0], value[-1]
            rows = torch.stack(
                [first, _change_row(last, 1, draw), _change_row(first, 2, draw), _change_row(first, 3, draw)]
            )
            rows_by_id[id(value)] = (rows, rows.roll(1, 0))
        return rows_by_id[id(value)][run]

    return _map_tensors(arguments, lambda value: chosen(value, 0)), _map_tensors(
        arguments, lambda value: chosen(value, 1)
    )


def _change_row(row: Tensor, by: int, draw: torch.Generator) -> Tensor:
    """Change the numbers of a row, or its tokens to others up to its largest token. Masks stay."""
    if is_number(row):
        kind = torch.complex64 if row.is_complex() else torch.float32
        noise = torch.randn(row.shape, generator=draw, dtype=kind).to(row.device, row.dtype)
        return row + noise * max(1e-3, float(row.abs().max()))
    if row.dtype == torch.long and not bool((row <= 1).all()):
        return (row + by) % (row.max() + 1)
    return row


def _map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        values = {key: _map_tensors(item, change) for key, item in value.items()}
        return values if type(value) is dict else type(value)(**values)
    return None if hasattr(value, "get_seq_length") else value
