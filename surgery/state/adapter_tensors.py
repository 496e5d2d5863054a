"""The containers of adapter tensors: `<site>.adapters.<adapter>.<name>`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SiteError
from surgery.forward.offloaded_weights import adapters_stay
from surgery.patterns.module_walk import RESERVED
from surgery.patterns.wrappers import child_of
from surgery.state.absent_values import note_absent, start_again, unwatch_absent

__all__ = ["AdapterTensors", "Adapters", "box_of"]


class AdapterTensors(nn.Module):
    """The parameters and buffers of one adapter at one site, under the names of its rules.

    The site's forward uses them; this module is never called. So a hook of accelerate that loads tensors before a call
    would leave the site with empty tensors: this module takes no such hook, and keeps its tensors where they run.

    The parameters of an idle adapter do not require gradients. `still` names the parameters that do not require them
    while it is live. They are names because tensors are replaced (`load_state_dict(assign=True)`, `.to()`, sharding).
    """

    still: frozenset[str] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_hf_hook":  # the hook has already moved or offloaded the tensors
            for own, tensor in adapters_stay(value, self.tensors()).items():
                (self._parameters if own in self._parameters else self._buffers)[own] = tensor  # type: ignore[index]
        elif name not in ("forward", "_old_forward"):  # which accelerate sets, too; this module is never called
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterTensors:
        before, emptied = self.tensors(), getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
        super()._apply(fn if emptied else partial(_apply_on_meta, fn), recurse)
        note_absent(self, before, emptied)
        return self

    def reset_parameters(self) -> None:
        """Set tensors that were created on the meta device to the initial values of their rules."""
        start_again(self)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the parameters and buffers by name."""
        tensors = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _apply_on_meta(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`fn(tensor)`; a tensor on the meta device that `fn` can't move becomes memory without values."""
    try:
        return fn(tensor)
    except NotImplementedError:  # "Cannot copy out of meta tensor"
        if not tensor.is_meta:
            raise
        sample = fn(torch.empty(0, dtype=tensor.dtype))
        return torch.empty_like(tensor, dtype=sample.dtype, device=sample.device)


class Adapters(nn.Module):
    """The child of a site with one `AdapterTensors` for each adapter."""

    _surgery_adapters = True

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Like any module's state dict, but empty inside a `base_alone` block."""
        if not getattr(_left_out, "now", False):
            return super().state_dict(*args, **kwargs)
        destination = kwargs.get("destination", args[0] if args else None)
        return {} if destination is None else destination


@contextmanager
def base_alone() -> Iterator[None]:
    """Inside the block, state dicts of this thread do not contain adapters."""
    before, _left_out.now = getattr(_left_out, "now", False), True
    try:
        yield
    finally:
        _left_out.now = before


_left_out = threading.local()


def tensors_of(
    module: nn.Module, adapter: str, path: str = "", state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Returns an adapter's tensors at a site, taken from a state dict of the model if one is passed."""
    box = box_of(module, adapter)
    tensors = box.tensors() if box is not None else {}
    if state_dict is None:
        return tensors
    prefix = ".".join(filter(None, (path, RESERVED, adapter)))
    return {name: state_dict[f"{prefix}.{name}"] for name in tensors}


def box_of(module: nn.Module, adapter: str) -> AdapterTensors | None:
    """Returns the container of an adapter's tensors at a site, or None."""
    adapters = module._modules.get(RESERVED)
    box = adapters._modules.get(adapter) if adapters is not None else None
    return box if isinstance(box, AdapterTensors) else None


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, which needs all its processes. Other tensors are returned as they are."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def first_process() -> bool:
    """Whether this process writes files: it is the first of several, or the only one."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def attach(module: nn.Module, adapter: str, tensors: Mapping[str, tuple[Tensor, bool]], where: str) -> None:
    """Add an adapter's tensors to a site: name → (tensor, whether it is a buffer)."""
    adapters = module._modules.get(RESERVED)
    if adapters is None:
        adapters = module._modules[RESERVED] = Adapters()
        if not module.training:
            adapters.training = False
    box = adapters._modules.get(adapter)
    if box is None:
        box = adapters._modules[adapter] = AdapterTensors()
        if not module.training:
            box.training = False
    for name, (tensor, is_buffer) in tensors.items():
        if name in box._parameters or name in box._buffers:
            raise SiteError(f"the adapter {adapter!r} already has a tensor {name!r}", where=where)
        if is_buffer:
            box.register_buffer(name, tensor)
        else:
            box._parameters[name] = tensor  # type: ignore[assignment]


def attach_again(module: nn.Module, adapter: str, name: str, parameter: Tensor) -> None:
    """Replace a parameter of an adapter at a site."""
    box = box_of(module, adapter)
    assert box is not None and name in box._parameters, name
    box._parameters[name] = parameter  # type: ignore[assignment]


def detach(module: nn.Module, adapter: str, names: list[str] | None = None) -> None:
    """Remove an adapter's tensors (or some of them) from a site, and the container with the last."""
    adapters = module._modules.get(RESERVED)
    box = adapters._modules.get(adapter) if adapters is not None else None
    if adapters is None or box is None:
        return
    for name in names or ():
        box._parameters.pop(name, None)
        box._buffers.pop(name, None)
        box._non_persistent_buffers_set.discard(name)
    if names is None or not (box._parameters or box._buffers):
        del adapters._modules[adapter]
    if not adapters._modules:
        del module._modules[RESERVED]
        unwatch_absent(module)


def is_adapter_key(model: nn.Module, key: str) -> bool:
    """Whether a dotted name leads into an adapter container, and not to another module named `adapters`."""
    module: nn.Module | None = model
    for part in key.split("."):
        if isinstance(module, Adapters):
            return True
        module = child_of(module, part) if module is not None else None
    return False
