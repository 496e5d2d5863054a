"""A watch on the code of a rewrite: torch functions without a value among their arguments, and blocks around lines.

What such a function makes is an ordinary tensor, for a rule may only want a starting value for `Site.param`. The watch
knows how it was made; once it meets a value, the calls that made it become steps of the tape.
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
from surgery.forward.tape import OPERATORS, Tape, Value, tape_of

__all__ = ["FunctionWatch", "unwatched"]


class _TorchCall:
    """A call without a value among its arguments. `made`: its tensors; `value`: what stands for its result."""

    def __init__(self, function: Any, args: tuple, kwargs: dict[str, Any], region: Region | None, result: Any):
        self.function, self.args, self.kwargs, self.region = function, args, kwargs, region
        self.result = result  # kept, so that an id belongs to one tensor
        self.value: Value | None = None

    def tensors(self) -> Iterator[Tensor]:
        yield from _tensors((self.args, self.kwargs, self.result))


class FunctionWatch(TorchFunctionMode):
    """Sees what torch functions a rewrite calls; `Tape.watched` while it does."""

    def __init__(self, tape: Tape):
        super().__init__()
        self.tape = tape
        self.block = Block()
        self.calls: list[_TorchCall] = []
        self.known: set[int] = set()  # ids of tensors that calls made
        self.seed, self.random = torch.initial_seed(), torch.random.get_rng_state()
        self.away = 0
        self.making = False

    @property
    def region(self) -> Region | None:
        return self.block.region

    def __enter__(self) -> FunctionWatch:
        self.tape.watched = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.tape.watched = None
        super().__exit__(*error)
        self.calls.clear()
        seeded = torch.initial_seed() != self.seed
        with torch._C.DisableTorchFunction():
            torch.random.set_rng_state(self.random)  # planning draws nothing
        if seeded and error[0] is None:
            raise SiteError(
                "a rewrite seeds torch's random numbers",
                where=self.tape.where,
                why="it runs once, when the rule is applied, and no call would be seeded",
                fix="seed in a function that site.apply calls",
            )

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.away:
            return func(*args, **kwargs)
        if tape_of((args, kwargs)) is not None:
            return Value.__torch_function__(func, types, args, kwargs)
        if func is torch._C._set_grad_enabled:
            self.block.seen(args[0])
            return func(*args, **kwargs)
        if draws("call_function", func, args, kwargs):
            with torch.random.fork_rng(devices=[]):  # planning draws nothing
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        given = [id(tensor) for tensor in _tensors((args, kwargs))]
        if not given and any(True for _ in _tensors(result)) or any(tensor in self.known for tensor in given):
            self.calls.append(_TorchCall(func, args, kwargs, self.region, result))
            self.known.update(id(tensor) for tensor in _tensors(result))
        return result

    def made(self, tensor: Tensor) -> Value | None:
        """A tensor as a value of the tape: the calls that made it, and those that wrote to it, become steps."""
        if id(tensor) not in self.known:
            return None
        if not self.making:
            self.making = True
            try:
                for call in self._related(tensor):
                    if call.value is None:
                        call.value = self._step(call)
            finally:
                self.making = False
        return self._standing(tensor)

    def _step(self, call: _TorchCall) -> Value:
        name = getattr(call.function, "__name__", "")
        if name == "__get__":
            return self.tape.call("function", getattr, (call.args[0], call.function.__self__.__name__), {}, call.region)
        function = OPERATORS.get(name, call.function)
        return self.tape.call("function", function, call.args, call.kwargs, call.region)

    def _related(self, tensor: Tensor) -> list[_TorchCall]:
        """The calls that have to do with a tensor, in the order in which they were made."""
        ids, related = {id(tensor)}, set[int]()
        while True:
            more = [
                index
                for index, call in enumerate(self.calls)
                if index not in related and any(id(one) in ids for one in call.tensors())
            ]
            if not more:
                return [self.calls[index] for index in sorted(related)]
            related.update(more)
            ids.update(id(one) for index in more for one in self.calls[index].tensors() if id(one) in self.known)

    def _standing(self, tensor: Tensor) -> Value | None:
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
def unwatched(tape: Tape) -> Iterator[None]:
    """What runs inside belongs to no rewrite: a forward that is traced, an example."""
    watch: Any = tape.watched
    if watch is None:
        yield
        return
    watch.away += 1
    try:
        yield
    finally:
        watch.away -= 1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
