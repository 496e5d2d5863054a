"""Where adapters' tensors live: `<site>.adapters.<adapter>.<name>`, in small modules that sites hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SiteError, SurgeryError
from surgery.patterns.module_walk import RESERVED
from surgery.patterns.wrappers import child_of
from surgery.state.absent_values import note_absent, start_again, unwatch_absent

__all__ = ["AdapterTensors", "Adapters", "box_of"]


class AdapterTensors(nn.Module):
    """The tensors of one adapter at one site: parameters and buffers, under the names the rules gave them.

    They are used by the site's forward, never by a call of this module, so a hook that brings them here before such a
    call would leave the site with tensors that have no data; torch computes with those without a word.

    While the adapter is idle none of its parameters requires gradients; `still` names those that don't either while it
    is live. Names, since tensors are replaced (by `load_state_dict(assign=True)`, `.to()`, sharding, more rank).
    """

    still: frozenset[str] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_hf_hook" and any(getattr(hook, "offload", False) for hook in getattr(value, "hooks", [value])):
            value.detach_hook(self)  # its tensors are away already
            raise SurgeryError(
                "accelerate can't offload a model that has adapters",
                why="it brings tensors back for a call of the module that holds them; adapters are used by their sites",
                fix="accelerate.hooks.remove_hook_from_submodules(model) takes off what it put on; don't offload",
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterTensors:
        before, emptied = self.tensors(), getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
        super()._apply(fn, recurse)
        note_absent(self, before, emptied)
        return self

    def reset_parameters(self) -> None:
        """Where the tensors were made on the meta device: the values that their rules start with."""
        start_again(self)

    def tensors(self) -> dict[str, Tensor]:
        held = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in held.items() if tensor is not None}


class Adapters(nn.Module):
    """The child of a site that holds its adapters' tensors, one `AdapterTensors` each."""

    _surgery_adapters = True

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's; nothing inside of a block of `base_alone`."""
        if not getattr(_left_out, "now", False):
            return super().state_dict(*args, **kwargs)
        destination = kwargs.get("destination", args[0] if args else None)
        return {} if destination is None else destination


@contextmanager
def base_alone() -> Iterator[None]:
    """A state dict that this thread takes inside of the block has no adapters in it: they are not gone through."""
    before, _left_out.now = getattr(_left_out, "now", False), True
    try:
        yield
    finally:
        _left_out.now = before


_left_out = threading.local()


def tensors_of(
    module: nn.Module, adapter: str, path: str = "", state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """An adapter's tensors at a site, as a state dict of the model's has them, if given; empty where it has none."""
    box = box_of(module, adapter)
    found = box.tensors() if box is not None else {}
    if state_dict is None:
        return found
    inside = ".".join(filter(None, (path, RESERVED, adapter)))
    return {name: state_dict[f"{inside}.{name}"] for name in found}


def box_of(module: nn.Module, adapter: str) -> AdapterTensors | None:
    """What holds an adapter's tensors at a site."""
    held = module._modules.get(RESERVED)
    found = held._modules.get(adapter) if held is not None else None
    return found if isinstance(found, AdapterTensors) else None


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered where it is sharded, which all its processes take part in."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def first_process() -> bool:
    """Whether this is the process that writes files: the first of several, or the only one."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def attach(module: nn.Module, adapter: str, tensors: Mapping[str, tuple[Tensor, bool]], where: str) -> None:
    """Give a site an adapter's tensors: name → (tensor, is it a buffer)."""
    held = module._modules.get(RESERVED)
    if held is None:
        held = module._modules[RESERVED] = Adapters()
        if not module.training:
            held.training = False
    box = held._modules.get(adapter)
    if box is None:
        box = held._modules[adapter] = AdapterTensors()
        if not module.training:
            box.training = False
    for name, (tensor, is_buffer) in tensors.items():
        if name in box._parameters or name in box._buffers:
            raise SiteError(f"the adapter {adapter!r} has a tensor {name!r} already", where=where)
        if is_buffer:
            box.register_buffer(name, tensor)
        else:
            box._parameters[name] = tensor  # type: ignore[assignment]


def attach_again(module: nn.Module, adapter: str, name: str, parameter: Tensor) -> None:
    """Another parameter in the place of one that an adapter has at a site."""
    box = box_of(module, adapter)
    assert box is not None and name in box._parameters, name
    box._parameters[name] = parameter  # type: ignore[assignment]


def detach(module: nn.Module, adapter: str, names: list[str] | None = None) -> None:
    """Take an adapter's tensors from a site (or some of them), and the holder with the last."""
    held = module._modules.get(RESERVED)
    box = held._modules.get(adapter) if held is not None else None
    if held is None or box is None:
        return
    for name in names or ():
        box._parameters.pop(name, None)
        box._buffers.pop(name, None)
        box._non_persistent_buffers_set.discard(name)
    if names is None or not (box._parameters or box._buffers):
        del held._modules[adapter]
    if not held._modules:
        del module._modules[RESERVED]
        unwatch_absent(module)


def is_adapter_key(model: nn.Module, key: str) -> bool:
    """Whether a dotted name leads into the adapters of a site, rather than to a module that happens to be called so."""
    module: nn.Module | None = model
    for part in key.split("."):
        if isinstance(module, Adapters):
            return True
        module = child_of(module, part) if module is not None else None
    return False
