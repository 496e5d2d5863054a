"""Detects parameters whose gradients DistributedDataParallel (DDP) does not reduce.

DDP reduces only the gradients of parameters that trained when DDP was made. Parameters that begin to train later would
differ between processes. A model does not know that DDP wraps it, so the check runs at a parameter's first gradient.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError

__all__ = ["watch_gradients"]


def watch_gradients(adapter: str, parameters: Iterable[Tensor]) -> None:
    """Raise `SurgeryError` at the first gradient of these parameters if DDP wraps them and does not reduce it."""
    if _several_processes():
        hook = _GradientWatch(adapter)
        for parameter in parameters:
            if parameter.requires_grad and parameter.is_leaf and not hasattr(parameter, "device_mesh"):
                hook.handles[id(parameter)] = parameter.register_post_accumulate_grad_hook(hook)


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class _GradientWatch:
    """A gradient hook on an adapter's parameters; each parameter's hook is removed after its first gradient."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self.handles: dict[int, Any] = {}
        self.wrappers: list[tuple[weakref.ref[nn.Module], set[int], set[int]]] = []
        self.backward: int | None = None  # the backward pass in which the wrappers were looked for

    def __call__(self, parameter: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if not self._reduced(parameter):
            if backward != self.backward:
                self.wrappers = [
                    (weakref.ref(wrapper), _parameters_of(wrapper), _reduced_parameters(wrapper))
                    for wrapper in _wrappers()
                ]
                self.backward = backward
            if not self._reduced(parameter) and any(id(parameter) in members for _, members, _ in self.wrappers):
                raise SurgeryError(
                    f"DDP does not reduce the gradients of the adapter {self.adapter!r}",
                    why="DDP reduces only the parameters that trained when it was made, and this adapter began to "
                    "train later: each process would learn other values",
                    fix="make DistributedDataParallel(model) after apply_rules, load_adapter or activate; or make it "
                    "while all adapters are live, with find_unused_parameters=True",
                )
        if (handle := self.handles.pop(id(parameter), None)) is not None:
            handle.remove()

    def _reduced(self, parameter: Tensor) -> bool:
        return any(wrapper() is not None and id(parameter) in reduced for wrapper, _, reduced in self.wrappers)


def _wrappers() -> list[Any]:
    kind = nn.parallel.DistributedDataParallel
    return [candidate for candidate in _objects() if issubclass(type(candidate), kind) and "reducer" in vars(candidate)]


def _objects() -> Iterable[Any]:
    """All objects that the garbage collector tracks, also those that `gc.freeze` took off its lists."""
    listed = gc.get_objects()
    return _reachable(listed) if gc.get_freeze_count() else listed


def _reachable(listed: list[Any]) -> Iterator[Any]:
    """Yields objects, and all that can be reached from them, from modules and from the variables of running functions.

    This takes seconds where there are millions of objects. `gc.unfreeze` would be faster, but `gc.freeze` could not
    restore the state before: it freezes all objects.
    """
    level: list[Any] = [
        *listed,
        *(vars(module) for module in list(sys.modules.values()) if hasattr(module, "__dict__")),
    ]
    for frame in sys._current_frames().values():
        while frame is not None:
            level.append(frame.f_locals)
            frame = frame.f_back
    seen: set[int] = set()
    while level:
        level = [new for new in level if id(new) not in seen and not seen.add(id(new))]
        yield from level
        level = [new for new in gc.get_referents(*level) if gc.is_tracked(new)]


def _parameters_of(wrapper: Any) -> set[int]:
    return {id(parameter) for parameter in wrapper.module.parameters()}


def _reduced_parameters(wrapper: Any) -> set[int]:
    buckets = wrapper.reducer._get_zeros_like_grad_buckets()
    late = {id(parameter) for parameter in wrapper._delay_all_reduce_params}
    return late | {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
