"""Whether the rows of a batch come first in what a module is called with, where shapes alone don't tell.

A pooled vector for each row, and a token for each row that an expert was given, look alike; so do (batch, positions)
and (positions, batch) of equal sizes. So a few rows are run, two of the batch and two made from them, and once more in
another order: where a module's input comes out in that order, by equal parts, the rows come first in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery.arithmetic.complex_numbers import is_number
from surgery.errors import SurgeryError
from surgery.routing.thread_state import paused
from surgery.state.records import site_state
from surgery.tracing.example_call import copied

__all__ = ["prove"]

Given = tuple[tuple, dict[str, Any]]
_ROWS = 4  # that are run
_COLUMNS = 64  # of each row, that are compared
_SEVERAL = 0  # one row of the batch makes several, such as its tokens or its windows


def prove(
    model: nn.Module, modules: Sequence[nn.Module], module: nn.Module, shape: tuple[int, ...], batch: int, given: Any
) -> None:
    """`SurgeryError` unless a batch's rows come first in a module's input, each as often as the shape says.

    `given`: the model's own arguments in the call that is running. What is found out of all `modules` is kept with
    them, by the number of dimensions of their inputs, for it is a property of the code: that one row of the batch makes
    one there, or several, however many.
    """
    site = site_state(module)
    assert site is not None
    found: int | str | None = site.layouts.get(len(shape))
    if found == _SEVERAL:
        return
    if found is None or found * batch != shape[0]:
        found = _looked(model, modules, module, len(shape), batch, given)
    if isinstance(found, int) and found * batch != shape[0]:
        found = f"{_ROWS} rows alone make {_ROWS * found} of them"
    if any(part.startswith("expert") for part in site.path.split(".")[:-1]):
        found = "a router sends experts some of the tokens"
    if isinstance(found, str):
        raise SurgeryError(
            "it can't be told whose rows a module is called with",
            where=site.path,
            why=f"they are {shape} for a batch of {batch}, and {found}",
            fix="take it out of the adapters; or, where the batch's rows come first there, route(…, check=False)",
        )
    site.layouts[len(shape)] = 1 if found == 1 else _SEVERAL


def _looked(
    model: nn.Module, modules: Sequence[nn.Module], module: nn.Module, dim: int, batch: int, given: Given | None
) -> int | str:
    """Run some rows in two orders, and note at each module how many rows of its input one of them makes."""
    if given is None:
        return "no call of the model itself is running, which could show it"
    try:
        one, other = _some_rows(given, batch)
        with paused(), torch.no_grad(), _evaluating(model), torch.random.fork_rng():
            state = torch.get_rng_state()
            first = _seen(model, modules, one)
            torch.set_rng_state(state)
            second = _seen(model, modules, other)
    except Exception as error:  # the model's own code, given a batch it may not be made for
        return f"the model can't be run on {_ROWS} rows ({type(error).__name__}: {error})"
    asked: int | str = f"{_ROWS} rows don't reach it"
    for inner in modules:
        site = site_state(inner)
        assert site is not None
        calls = list(zip(first.get(id(inner), ()), second.get(id(inner), ()), strict=False))
        if len(first.get(id(inner), ())) != len(second.get(id(inner), ())):
            calls = []
        for dims in {dims for (dims, _), _ in calls}:
            told = {_turned(a, b) for (d, a), (_, b) in calls if d == dims}
            found = told.pop() if len(told) == 1 else "they are not the same in all calls of the module"
            if isinstance(found, int) and inner is not module:
                site.layouts.setdefault(dims, found)
            if inner is module and dims == dim:
                asked = found
    return asked


def _turned(one: Tensor, other: Tensor) -> int | str:
    """How many rows each part has, where the parts of the other are those of the one, the last one first."""
    part, left = divmod(len(one), _ROWS)
    if one.shape != other.shape or left or not part:
        return "rows in another order make inputs of other shapes"
    near = 1e-3 * max(1e-6, float(one.abs().max()))
    if not torch.allclose(other, one.roll(part, 0), rtol=0.0, atol=near):
        return "the rows of the batch don't come first in it"
    if torch.allclose(one, one.roll(part, 0), rtol=0.0, atol=near):
        return "all rows look alike there"
    return part


def _seen(model: nn.Module, modules: Sequence[nn.Module], given: Given) -> dict[int, list[tuple[int, Tensor]]]:
    """A few numbers of each row of what each module is called with."""
    found: dict[int, list[tuple[int, Tensor]]] = {}
    me = threading.get_ident()

    def enter(module: nn.Module, args: tuple, kwargs: Any = None) -> None:
        # In other threads it may be called before torch has noted that it takes keywords.
        value = next((v for v in (*args, *(kwargs or {}).values()) if isinstance(v, Tensor) and v.dim()), None)
        if value is not None and threading.get_ident() == me:
            flat = value.detach().reshape(len(value), -1) if value.numel() else value.reshape(len(value), 0)
            step = max(1, flat.shape[1] // _COLUMNS)
            found.setdefault(id(module), []).append((value.dim(), _wide(flat[:, ::step]).cpu()))

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
    try:
        model(*copied(given[0]), **copied(given[1]))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.complex128) if value.is_complex() else value.double()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _some_rows(given: Given, batch: int) -> tuple[Given, Given]:
    """The arguments with rows of the batch and others made from them, and with the last one first; caches left out."""
    draw = torch.Generator().manual_seed(0)  # its own: other threads draw from torch's
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def chosen(value: Tensor, which: int) -> Tensor:
        if not value.dim() or len(value) != batch:
            return value
        if id(value) not in known:
            first, last = value[0], value[-1]
            rows = torch.stack([first, _other(last, 1, draw), _other(first, 2, draw), _other(first, 3, draw)])
            known[id(value)] = (rows, rows.roll(1, 0))
        return known[id(value)][which]

    return _mapped(given, lambda value: chosen(value, 0)), _mapped(given, lambda value: chosen(value, 1))


def _other(row: Tensor, by: int, draw: torch.Generator) -> Tensor:
    """Another row: other numbers, or other tokens of those that there must be, too. Masks stay."""
    if is_number(row):
        kind = torch.complex64 if row.is_complex() else torch.float32
        noise = torch.randn(row.shape, generator=draw, dtype=kind).to(row.device, row.dtype)
        return row + noise * max(1e-3, float(row.abs().max()))
    if row.dtype == torch.long and not bool((row <= 1).all()):
        return (row + by) % (row.max() + 1)
    return row


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    if isinstance(value, dict):
        found = {key: _mapped(item, change) for key, item in value.items()}
        return found if type(value) is dict else type(value)(**found)
    return None if hasattr(value, "get_seq_length") else value
