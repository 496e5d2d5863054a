"""Detects parameters whose gradients DistributedDataParallel (DDP) does not reduce.

DDP reduces only the gradients of parameters that trained when DDP was made. Parameters that begin to train later would
differ between processes. A model does not know that DDP wraps it, so the check runs at a parameter's first gradient.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
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

    def __call__(self, parameter: Tensor) -> None:
        if not self._reduced(parameter):
            self.wrappers = [
                (weakref.ref(wrapper), _parameters_of(wrapper), _reduced_parameters(wrapper)) for wrapper in _wrappers()
            ]
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
    return [
        candidate
        for candidate in gc.get_objects()
        if issubclass(type(candidate), kind) and "reducer" in vars(candidate)
    ]


def _parameters_of(wrapper: Any) -> set[int]:
    return {id(parameter) for parameter in wrapper.module.parameters()}


def _reduced_parameters(wrapper: Any) -> set[int]:
    buckets = wrapper.reducer._get_zeros_like_grad_buckets()
    late = {id(parameter) for parameter in wrapper._delay_all_reduce_params}
    return late | {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
