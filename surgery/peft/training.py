"""What PEFT's models of some methods do while training: a term of the loss, and ranks that are shared out."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from surgery.peft.delegation import Facade
from surgery.peft_format.methods import method_of

__all__ = ["add_to_loss", "allocation_of"]

# Model → adapter → its allocator, which counts from call to call how much each direction matters.
_ALLOCATORS: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def add_to_loss(facade: Facade, names: list[str], output: Any) -> Any:
    """Return a call's output, its loss with the terms that PEFT's models of the adapters' methods add."""
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        return output
    for name in names:
        config = facade._configs.get(name)
        if config is not None and not config.inference_mode:
            term = method_of(config.method).loss_of(facade._base, name)
            if term is not None:
                output.loss = loss = loss + term.to(loss.device)
    return output


def allocation_of(facade: Facade, names: list[str]) -> Any:
    """The function `update_and_allocate(step)` of the first adapter that has one; None where no adapter has."""
    for name in names:
        config = facade._configs.get(name)
        if config is None or config.inference_mode:
            continue
        allocator = method_of(config.method).allocator_of(facade._base, name)
        if allocator is None:
            continue
        known = _ALLOCATORS.setdefault(facade._base, {})
        before = known.get(name)
        if before is None or _parameters(before) != _parameters(allocator):  # it is of an adapter that is gone
            known[name] = allocator
        return known[name].update_and_allocate
    return None


def _parameters(allocator: Any) -> list[int]:
    return [id(tensor) for tensors in allocator.sites.values() for tensor in tensors.values()]
