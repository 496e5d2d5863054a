"""Restores modules after calls that only look: a trial call, or the run of a trace.

A forward may change its model by what it is called with: BigBird gives up sparse attention for good at a short text.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from surgery.packed.packed_weight import packed_weight_of
from surgery.patterns.module_walk import base_modules
from surgery.sharded_tensors import sharding_of
from surgery.transaction.undo_log import Trial, refill

__all__ = ["restore_modules", "restore_state"]


@contextmanager
def restore_state(module: nn.Module) -> Iterator[None]:
    """As `restore_modules`, and restore all random states after the block: of torch, numpy and Python."""
    numpy = sys.modules.get("numpy")
    random_states = random.getstate(), numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(), restore_modules(module):
            yield
    finally:
        random.setstate(random_states[0])
        if numpy is not None:
            numpy.random.set_state(random_states[1])


@contextmanager
def restore_modules(model: nn.Module) -> Iterator[None]:
    """Restore the attributes, children, tensors and buffers' numbers of the model and its modules after the block.

    Numbers that a forward writes into a parameter in place stay, because a copy of all parameters is too large. Modules
    whose class changes (those of `torch.nn.LazyLinear` and the like) and sharded modules stay as the block left them.
    """
    with Trial() as trial:
        for _, module in base_modules(model):
            if not isinstance(module, torch.jit.ScriptModule) and sharding_of(module) is None:
                trial.undo(_Before(module).restore)
        yield


class _Before:
    """What a module has before the block."""

    def __init__(self, module: nn.Module):
        self.module, self.cls = module, type(module)
        own = [value for name, value in module.__dict__.items() if name not in _MODULE_STATE]
        containers = [value for value in own if type(value) in (list, dict, set)]
        containers += [module.__dict__, *(module.__dict__[name] for name in _TENSORS_AND_CHILDREN)]
        self.containers = [(container, container.copy()) for container in containers]
        buffers = [buffer for buffer in module._buffers.values() if buffer is not None and not buffer.is_meta]
        codes = packed_weight_of(module) is not None  # no forward writes numbers into codes
        self.numbers = [(buffer, buffer.detach().clone()) for buffer in buffers if not codes]
        # `tensor.data = …` puts other memory into a tensor.
        tensors = [*module._parameters.values(), *(buffers if codes else ())]
        self.memory = [(tensor, tensor.detach()) for tensor in tensors if tensor is not None and _is_plain(tensor)]

    def restore(self) -> None:
        if type(self.module) is not self.cls or self._sharded_meanwhile():
            return
        for container, items in self.containers:
            refill(container, items)
        for tensor, before in self.memory:
            if _is_plain(tensor) and not _has_memory_of(tensor, before):
                tensor.data = before
        with torch.no_grad():
            for buffer, numbers in self.numbers:
                if buffer.shape != numbers.shape or buffer.dtype != numbers.dtype or buffer.device != numbers.device:
                    buffer.data = numbers
                elif not torch.equal(buffer, numbers):
                    buffer.copy_(numbers)

    def _sharded_meanwhile(self) -> bool:
        """Whether the block has put parts in the place of whole parameters."""
        parameters = self.module._parameters
        own = next(items for container, items in self.containers if container is parameters)
        same = all(parameters.get(name) is tensor for name, tensor in own.items())
        return not same and sharding_of(self.module) is not None


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def _has_memory_of(tensor: Tensor, other: Tensor) -> bool:
    return (
        tensor.device == other.device
        and tensor.dtype == other.dtype
        and tensor.shape == other.shape
        and tensor.stride() == other.stride()
        and tensor.data_ptr() == other.data_ptr()
    )


_TENSORS_AND_CHILDREN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_MODULE_STATE = frozenset(nn.Module().__dict__)
