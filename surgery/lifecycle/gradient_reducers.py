"""Parameters that come to train in a model that DDP is around: DDP reduces the gradients of those alone that trained
when it was made, and each process would go its own way with the others.

Nothing on a model says that DDP is around it. So parameters that begin to train, where there are several processes, are
asked at their first gradient.
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
    """Have the first gradient of these parameters of an adapter be an error, where DDP is around them and does not
    reduce it."""
    if _several_processes():
        one = _Watch(adapter)
        for parameter in parameters:
            if parameter.requires_grad and parameter.is_leaf and not hasattr(parameter, "device_mesh"):
                one.handles[id(parameter)] = parameter.register_post_accumulate_grad_hook(one)


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class _Watch:
    """The hook of some parameters. Each takes it off after its first gradient."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self.handles: dict[int, Any] = {}
        self.found: list[tuple[weakref.ref[nn.Module], set[int], set[int]]] = []

    def __call__(self, parameter: Tensor) -> None:
        if not self._reduced(parameter):
            self.found = [(weakref.ref(wrapper), _held_by(wrapper), _reduced_by(wrapper)) for wrapper in _wrappers()]
            if not self._reduced(parameter) and any(id(parameter) in held for _, held, _ in self.found):
                raise SurgeryError(
                    f"DDP does not reduce the gradients of the adapter {self.adapter!r}",
                    why="it reduces those of the parameters that trained when it was made, and this adapter came to "
                    "train later: each process would learn numbers of its own",
                    fix="DistributedDataParallel(model) anew after apply_rules, load_adapter or activate; or make it "
                    "while all adapters are live, with find_unused_parameters=True",
                )
        if (handle := self.handles.pop(id(parameter), None)) is not None:
            handle.remove()

    def _reduced(self, parameter: Tensor) -> bool:
        return any(wrapper() is not None and id(parameter) in reduced for wrapper, _, reduced in self.found)


def _wrappers() -> list[Any]:
    kind = nn.parallel.DistributedDataParallel
    return [found for found in gc.get_objects() if issubclass(type(found), kind) and "reducer" in vars(found)]


def _held_by(wrapper: Any) -> set[int]:
    return {id(parameter) for parameter in wrapper.module.parameters()}


def _reduced_by(wrapper: Any) -> set[int]:
    buckets = wrapper.reducer._get_zeros_like_grad_buckets()
    late = {id(parameter) for parameter in wrapper._delay_all_reduce_params}
    return late | {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
