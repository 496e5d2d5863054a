"""Reads and writes weights that accelerate keeps on the CPU or on disk, in the `weights_map` of its hooks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.forward.parameter_view import tensor_at
from surgery.patterns.module_walk import base_modules
from surgery.patterns.offload_hooks import offload_hook

__all__ = [
    "adapters_stay",
    "device_of_calls",
    "initial_copy",
    "keep_value",
    "keys_that_share",
    "value_at",
    "weights_present",
]


def device_of_calls(module: nn.Module) -> torch.device | None:
    """Returns the device on which an offloaded module runs; None for other modules.

    A module without tensors of its own, such as an attention, runs where the first module with tensors inside it does.
    """
    first = next((part for part in module.modules() if _has_tensors(part)), module)
    hook = offload_hook(first)
    if hook is None or hook.execution_device is None:
        return None
    device = hook.execution_device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _has_tensors(module: nn.Module) -> bool:
    return any(tensor is not None for kind in (module._parameters, module._buffers) for tensor in kind.values())


def value_at(module: nn.Module, name: str) -> Tensor:
    """Returns a parameter or buffer by dotted name. Of an offloaded module: a copy of its value, where calls run."""
    tensor = tensor_at(module, name)
    if not tensor.is_meta:
        return tensor
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    hook = offload_hook(owner)
    return tensor if hook is None else _value(owner, hook, last)


def initial_copy(module: nn.Module, source: Tensor) -> Callable[[Tensor], Any]:
    """Returns a function that copies a tensor into another one: the value, if it is a tensor of an offloaded module."""
    if not source.is_meta:
        source = source.detach()
        return lambda tensor: tensor.copy_(source)

    # Each call gives the module other tensors on the meta device, so the name is looked up now.
    own = itertools.chain(module.named_parameters(), module.named_buffers())
    name = next((name for name, candidate in own if candidate is source), None)
    empty = source.detach()
    return lambda tensor: tensor.copy_(empty if name is None or tensor.is_meta else value_at(module, name))


@contextmanager
def weights_present(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside the block, an offloaded module and its children have their values. Changes inside it are not kept.

    Yields the values by dotted name. The tensors of other modules stay as they are. At the end the module has the same
    tensors on the meta device again.
    """
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    values: dict[str, Tensor] = {}
    try:
        for path, owner in base_modules(module):  # accelerate never offloads adapters (`adapters_stay`)
            hook = offload_hook(owner)
            kinds: list[dict[str, Any]] = [owner._parameters, owner._buffers] if hook is not None else []
            for kind in kinds:
                for name, tensor in kind.items():
                    if tensor is not None and tensor.is_meta:
                        value = _value(owner, hook, name)
                        new = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
                        before.append((kind, name, tensor))
                        kind[name] = new
                        values[f"{path}.{name}".strip(".")] = new
        yield values
    finally:
        for kind, name, tensor in before:
            kind[name] = tensor


def keep_value(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a new value for a tensor of an offloaded module where accelerate keeps it: into its dict, or on disk.

    A file of the original checkpoint is never written: the value goes into the offload folder beside it, or into
    memory if there is none.
    """
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    hook = offload_hook(owner)
    assert hook is not None, name
    store, key = _store(hook, last)
    value = value.detach()
    if isinstance(store, MutableMapping):
        store[key] = value.to("cpu", copy=True)
        return
    memory, index, folder = (getattr(store, part, None) for part in ("state_dict", "index", "save_folder"))
    if memory is None or index is None:
        raise SurgeryError(
            "the weights of an offloaded module can't be written",
            where=key,
            why=f"accelerate keeps them in a {type(store).__name__}, which is not known here",
            fix="load the model without offloading",
        )
    if key in memory or folder is None:
        memory[key] = value.to("cpu", copy=True)
        return
    from accelerate.utils import offload_weight

    entry: dict[str, Any] = {}
    offload_weight(value.cpu().contiguous(), f"{key}.surgery", folder, index=entry)
    os.replace(os.path.join(folder, f"{key}.surgery.dat"), os.path.join(folder, f"{key}.dat"))
    index[key] = entry[f"{key}.surgery"]


def adapters_stay(hook: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns an adapter's tensors on the device of calls, after accelerate gave their container a hook.

    accelerate loads tensors for a call of their module, but the container is never called. So they stay where they run.
    """
    for part in getattr(hook, "hooks", (hook,)):
        device, values = getattr(part, "execution_device", None), getattr(part, "weights_map", None)
        if device is None:
            continue
        moved: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            value = values[name].detach() if tensor.is_meta and values is not None else tensor.detach()
            new = value.to(device, copy=tensor.is_meta)
            moved[name] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        tensors = moved
    return dict(tensors)


def keys_that_share(module: nn.Module, name: str) -> list[str]:
    """Returns the other keys under which accelerate keeps the memory of a tensor on the CPU: those of tied weights."""
    path, _, last = name.rpartition(".")
    hook = offload_hook(module.get_submodule(path))
    if hook is None:
        return []
    store, key = _store(hook, last)
    memory: Mapping[str, Tensor] = store if isinstance(store, dict) else getattr(store, "state_dict", {})
    if key not in memory or not memory[key].numel():
        return []
    place = memory[key].data_ptr()
    return [other for other, tensor in memory.items() if other != key and tensor.data_ptr() == place]


def _store(hook: Any, name: str) -> tuple[Any, str]:
    """Returns where a hook's values are, and the key of a tensor there."""
    store, key = hook.weights_map, name
    while hasattr(store, "dataset") and hasattr(store, "prefix"):  # accelerate's PrefixedDataset
        store, key = store.dataset, f"{store.prefix}{key}"
    return store, key


def _value(module: nn.Module, hook: Any, name: str) -> Tensor:
    try:
        value = hook.weights_map[name]
    except KeyError:
        raise SurgeryError(
            f"accelerate has no value for the {name} of this {type(module).__name__}",
            why="its hook does not list the tensor",
            fix="load the model again",
        ) from None
    return value.detach().to(device_of_calls(module) or value.device, copy=True)
