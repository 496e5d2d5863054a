"""Watches the code of a rewrite: torch functions without a value among their arguments, and blocks around lines.

Such a function returns an ordinary tensor, because a rule may need only an initial value for `Site.param`. The watch
remembers the calls that created the tensor. Once the tensor meets a value, these calls become steps of the tape.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from surgery.errors import SiteError
from surgery.forward.context_regions import Block, Region
from surgery.forward.side_effects import draws
from surgery.forward.tape import Tape
from surgery.forward.values import OPERATORS, Value, tape_of

__all__ = ["FunctionWatch", "pause_watch"]


class _TorchCall:
    """A call without a value among its arguments. `value`: its result on the tape, once the call is a step."""

    def __init__(self, function: Any, args: tuple, kwargs: dict[str, Any], region: Region | None, result: Any):
        self.function, self.args, self.kwargs, self.region = function, args, kwargs, region
        self.result = result  # kept alive, so that no other tensor gets the same id
        self.value: Value | None = None

    def tensors(self) -> Iterator[Tensor]:
        yield from _tensors((self.args, self.kwargs, self.result))


class FunctionWatch(TorchFunctionMode):
    """Sees the torch functions that a rewrite calls. It is the tape's `watched` while the rewrite runs."""

    def __init__(self, tape: Tape):
        super().__init__()
        self.tape = tape
        self.block = Block()
        self.calls: list[_TorchCall] = []
        self.traced_ids: set[int] = set()  # ids of the tensors that `calls` created
        self.seed, self.random = torch.initial_seed(), torch.random.get_rng_state()
        self.pauses = 0  # how many `pause_watch` blocks are open
        self.writing_steps = False

    @property
    def region(self) -> Region | None:
        return self.block.region

    def __enter__(self) -> FunctionWatch:
        self.tape.watch = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.tape.watch = None
        super().__exit__(*error)
        self.calls.clear()
        seeded = torch.initial_seed() != self.seed
        with torch._C.DisableTorchFunction():
            torch.random.set_rng_state(self.random)  # planning must not advance the random state
        if seeded and error[0] is None:
            raise SiteError(
                "a rewrite seeds torch's random numbers",
                where=self.tape.where,
                why="it runs once, when the rule is applied, and no call would be seeded",
                fix="seed in a function that site.apply calls",
            )

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.pauses:
            return func(*args, **kwargs)
        if tape_of((args, kwargs)) is not None:
            return Value.__torch_function__(func, types, args, kwargs)
        if func is torch._C._set_grad_enabled:
            self.block.note_gradient_mode(args[0])
            return func(*args, **kwargs)
        if draws("call_function", func, args, kwargs):
            with torch.random.fork_rng(devices=[]):  # planning must not advance the random state
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        operand_ids = [id(tensor) for tensor in _tensors((args, kwargs))]
        creates = not operand_ids and any(True for _ in _tensors(result))
        if creates or any(operand in self.traced_ids for operand in operand_ids):
            self.calls.append(_TorchCall(func, args, kwargs, self.region, result))
            self.traced_ids.update(id(tensor) for tensor in _tensors(result))
        return result

    def value_of(self, tensor: Tensor) -> Value | None:
        """Returns a tensor as a value of the tape. The calls that created it or wrote to it become steps."""
        if id(tensor) not in self.traced_ids:
            return None
        if not self.writing_steps:
            self.writing_steps = True
            try:
                for call in self._related_calls(tensor):
                    if call.value is None:
                        call.value = self._write_step(call)
            finally:
                self.writing_steps = False
        return self._result_value(tensor)

    def _write_step(self, call: _TorchCall) -> Value:
        name = getattr(call.function, "__name__", "")
        if name == "__get__":
            return self.tape.call("function", getattr, (call.args[0], call.function.__self__.__name__), {}, call.region)
        function = OPERATORS.get(name, call.function)
        return self.tape.call("function", function, call.args, call.kwargs, call.region)

    def _related_calls(self, tensor: Tensor) -> list[_TorchCall]:
        """Returns the calls that read or return a tensor, or any tensor related to it, in their order."""
        ids, related = {id(tensor)}, set[int]()
        while True:
            more = [
                index
                for index, call in enumerate(self.calls)
                if index not in related and any(id(operand) in ids for operand in call.tensors())
            ]
            if not more:
                return [self.calls[index] for index in sorted(related)]
            related.update(more)
            operands = (operand for index in more for operand in self.calls[index].tensors())
            ids.update(id(operand) for operand in operands if id(operand) in self.traced_ids)

    def _result_value(self, tensor: Tensor) -> Value | None:
        """Returns the value of the call that returned this tensor; None if no step returns it."""
        for call in self.calls:
            if call.value is None:
                continue
            if call.result is tensor:
                return call.value
            if isinstance(call.result, (tuple, list)):
                for index, item in enumerate(call.result):
                    if item is tensor:
                        return self.tape.call("function", operator.getitem, (call.value, index), {})
        return None


@contextmanager
def pause_watch(tape: Tape) -> Iterator[None]:
    """Pause the watch. The code inside, such as a traced forward or an example call, is not part of the rewrite."""
    watch: Any = tape.watch
    if watch is None:
        yield
        return
    watch.pauses += 1
    try:
        yield
    finally:
        watch.pauses -= 1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
