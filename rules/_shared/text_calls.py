"""The running calls of text models, so that a module deep inside knows on which tokens of its call it acts.

A call begins and ends at the module that takes the token ids. Calls are kept for each thread. Activation checkpointing
runs modules once more inside of a backward pass, when their call has ended: a hook on the call's output notes which
call a backward pass belongs to.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
import torch._compile
from torch import Tensor, nn

from surgery import SiteError

# A decorator: compiled code calls the function outside of its graph. torch.compiler.disable would import the compiler
# at once, which takes a second; this one imports it when the function is called.
uncompiled = torch._compile._disable_dynamo


@dataclass(eq=False)
class TextCall:
    """One call of a text model, for one adapter.

    `last`: for each row, on how many of its last tokens the adapter acts; `length`: the number of tokens of the call;
    `memory`: what the code that began the call keeps with it.
    """

    model: nn.Module
    adapter: str
    last: Tensor
    length: int
    memory: Any = None

    def acts_on(self, value: Tensor) -> Tensor:
        """Returns a mask over a module's output: the tokens on which the adapter acts. It is counted from the end."""
        rows, last = self.last.shape[0], self.last.to(value.device)
        if value.dim() == 2 and value.shape[0] == rows * self.length:  # all tokens in one axis
            return _last_columns(last, self.length).view(-1, 1)
        if value.dim() == 2 and value.shape[0] == rows:  # one token of each row
            return (last > 0).view(-1, 1)
        if value.dim() > 2 and value.shape[0] == rows:
            return _last_columns(last, value.shape[1]).view(rows, -1, *[1] * (value.dim() - 2))
        raise SiteError(
            f"it can't be told which tokens the {tuple(value.shape)} of a module belong to",
            why=f"the call has {rows} rows of {self.length} tokens",
            fix="exclude the module from the targets",
        )


class _Thread(threading.local):
    calls: tuple[TextCall, ...] = ()
    last: tuple[int, ...] | None = None  # what the caller says, for all adapters


_thread = _Thread()
_inside: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
_recomputed: dict[int, list[ref[TextCall]]] = {}  # the number of a backward pass → calls whose output it came through
_lock = threading.Lock()


@contextmanager
def last_tokens(counts: Sequence[int | None]) -> Iterator[None]:
    """In the context, adapters act on this many of the last tokens of each row of a call; None and 0: on none."""
    before = _thread.last
    _thread.last = tuple([count or 0 for count in counts])
    try:
        yield
    finally:
        _thread.last = before


def said_last(rows: int, length: int, device: torch.device) -> Tensor | None:
    """Returns what the caller says of a call of this size, or None."""
    if _thread.last is None:
        return None
    if rows % len(_thread.last):
        why = f"there are {len(_thread.last)} numbers for {rows} rows"
        raise SiteError("it can't be told on which tokens an adapter acts", why=why, fix="give a number for each row")
    counts = torch.tensor(_thread.last, device=device).clamp(max=length)
    return counts.repeat_interleave(rows // len(_thread.last))


def begin(call: TextCall) -> None:
    """Note a call as running. A call of the same model that ended by an error is forgotten."""
    calls = _thread.calls
    stale = [i for i, other in enumerate(calls) if other.model is call.model and other.adapter == call.adapter]
    _thread.calls = (*calls[: stale[0] if stale else len(calls)], call)


def end(model: nn.Module, adapter: str, output: Any) -> TextCall | None:
    """Note the end of a call. Returns the call, or None if none of this model is running."""
    call = next((c for c in reversed(_thread.calls) if c.model is model and c.adapter == adapter), None)
    if call is None:
        return None
    _thread.calls = tuple([other for other in _thread.calls if other is not call])
    if torch.is_grad_enabled():
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(_note_backward, call))
    return call


def running(module: nn.Module, adapter: str) -> TextCall | None:
    """Returns the call in which a module runs, or runs once more during a backward pass; None outside of any call."""
    for call in reversed(_thread.calls):
        if call.adapter == adapter and _contains(call.model, module):
            return call
    task = torch._C._current_graph_task_id()
    if task == -1:
        return None
    with _lock:
        calls = [call for reference in _recomputed.get(task, ()) if (call := reference()) is not None]
    for call in reversed(calls):
        if call.adapter == adapter and _contains(call.model, module):
            return call
    raise SiteError(
        "it can't be told which call's activations are computed once more",
        why="the backward pass did not come through the output of a call of the model",
        fix="call backward on what the model returns, or turn activation checkpointing off",
    )


def is_inner(module: nn.Module, adapter: str) -> bool:
    """Whether a call of a module around this one is running."""
    return any(
        call.adapter == adapter and call.model is not module and _contains(call.model, module) for call in _thread.calls
    )


def _note_backward(call: TextCall, gradient: Tensor) -> None:
    with _lock:
        for task in [task for task, calls in _recomputed.items() if all(known() is None for known in calls)]:
            del _recomputed[task]
        _recomputed.setdefault(torch._C._current_graph_task_id(), []).append(ref(call))


def _contains(model: nn.Module, module: nn.Module) -> bool:
    known = _inside.get(model)
    if known is None:
        known = _inside[model] = WeakSet()
    if module not in known:
        if not any(inner is module for inner in model.modules()):
            return False
        known.add(module)
    return True


def _last_columns(last: Tensor, columns: int) -> Tensor:
    return torch.arange(columns, device=last.device) >= columns - last.unsqueeze(1)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(item)
