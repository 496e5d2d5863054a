"""Wrappers: modules that stand around another one (DDP, torch.compile, activation checkpointing) and add to its names.

Sites, state dicts and files have the names that the model has without them, so that a file saved with a wrapper loads
without, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from surgery.errors import SurgeryError

__all__ = ["child_of", "inner_of", "plain_name", "submodule", "taken_from", "unwrapped"]

_INNER = {  # the class of a wrapper, and the name of the child that it stands around
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
    "lightning.fabric.wrappers._FabricModule": "_forward_module",
    "lightning_fabric.wrappers._FabricModule": "_forward_module",
}
SEGMENTS = frozenset(_INNER.values())


def inner_of(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper stands around; None for a module that is not a wrapper.

    >>> from torch import nn
    >>> from surgery.patterns.wrappers import inner_of
    >>> layer = nn.Linear(2, 2)
    >>> inner_of(nn.DataParallel(layer)) is layer, inner_of(layer)
    (True, None)
    """
    children = module._modules
    if SEGMENTS.isdisjoint(children.keys()):  # a ScriptModule has something here that is no dict
        return None
    for cls in type(module).__mro__:
        name = _INNER.get(f"{cls.__module__}.{cls.__qualname__}")
        if name is not None:
            return children[name] if name in children else None
    return None


def unwrapped(module: Any) -> Any:
    """The module inside of all wrappers around it."""
    while isinstance(module, nn.Module) and (inner := inner_of(module)) is not None:
        module = inner
    return module


def child_of(module: nn.Module, name: str) -> nn.Module | None:
    """A module's child of this name, through wrappers around the module and whether or not the name has their segments.

    Asked with `in`: the children of a ScriptModule are kept in something that has no `get`.
    """
    while name not in module._modules:
        inner = inner_of(module)
        if inner is None:
            return None
        module = inner
    return module._modules[name]


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a path that has no wrapper's segments. AttributeError where there is none."""
    found = model
    for part in path.split(".") if path else ():
        child = child_of(found, part)
        found = child if child is not None else found.get_submodule(part)
    return unwrapped(found)


def plain_name(name: str) -> str:
    """A dotted name without any segment that a wrapper may have added."""
    parts = name.split(".")
    return name if SEGMENTS.isdisjoint(parts) else ".".join(part for part in parts if part not in SEGMENTS)


def taken_from(state_dict: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of these names in a given state dict, whose keys may have wrappers' segments.

    `SurgeryError` where one is absent, can't be told from another, or is sharded: a process that saves alone must not
    wait for others.
    """
    found, absent = dict[str, Tensor](), list[str]()
    plain: dict[str, list[str]] | None = None
    for name in names:
        key: str | None = name
        if name not in state_dict:
            if plain is None:
                plain = {}
                for other in state_dict:
                    plain.setdefault(plain_name(other), []).append(other)
            keys = plain.get(plain_name(name), [])
            key = keys[0] if len(keys) == 1 else None
        if key is None:
            absent.append(name)
            continue
        tensor = state_dict[key]
        if hasattr(tensor, "full_tensor"):
            raise SurgeryError(
                "the state dict that was given is sharded",
                where=key,
                why="each process has a part of the tensor (DTensor), and one process saves alone",
                fix="gather it: get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))",
            )
        found[name] = tensor
    if absent:
        near = next(iter(state_dict), None)
        raise SurgeryError(
            f"the state dict that was given lacks {len(absent)} tensors of the adapter, such as {absent[0]}",
            why=f"it has {len(state_dict)} keys" + (f", such as {near}" if near is not None else ""),
            fix="give the model's whole state dict, gathered from all processes; only wrappers' segments (module, "
            "_orig_mod, _checkpoint_wrapped_module) may differ in the names",
        )
    return found
