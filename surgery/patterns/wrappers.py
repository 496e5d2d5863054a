"""Looks through wrappers: modules that contain the model and add a segment to its names (DDP, torch.compile, …).

Sites, state dicts and files use the names of the model without wrappers. A file saved with a wrapper therefore loads
without the wrapper, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from surgery.errors import SurgeryError

__all__ = ["child_of", "inner_of", "plain_name", "submodule", "select_tensors", "unwrap"]

_INNER = {  # the class of a wrapper → the name of the child that it wraps
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
    """Returns the module that a wrapper contains; None for a module that is not a wrapper.

    >>> from torch import nn
    >>> from surgery.patterns.wrappers import inner_of
    >>> layer = nn.Linear(2, 2)
    >>> inner_of(nn.DataParallel(layer)) is layer, inner_of(layer)
    (True, None)
    """
    children = module._modules
    if SEGMENTS.isdisjoint(children.keys()):  # in a ScriptModule this is not a dict
        return None
    for cls in type(module).__mro__:
        name = _INNER.get(f"{cls.__module__}.{cls.__qualname__}")
        if name is not None:
            return children[name] if name in children else None
    return None


def unwrap(module: Any) -> Any:
    """Returns the module inside all its wrappers."""
    while isinstance(module, nn.Module) and (inner := inner_of(module)) is not None:
        module = inner
    return module


def child_of(module: nn.Module, name: str) -> nn.Module | None:
    """Returns the child of this name, looking through wrappers; None if it does not exist.

    It tests with `in`, because the children of a ScriptModule are not a dict and have no `get`.
    """
    while name not in module._modules:
        inner = inner_of(module)
        if inner is None:
            return None
        module = inner
    return module._modules[name]


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Returns the module at a path without wrapper segments. Raises AttributeError if it does not exist."""
    module = model
    for part in path.split(".") if path else ():
        child = child_of(module, part)
        module = child if child is not None else module.get_submodule(part)
    return unwrap(module)


def plain_name(name: str) -> str:
    """Removes the segments that wrappers add from a dotted name."""
    parts = name.split(".")
    return name if SEGMENTS.isdisjoint(parts) else ".".join(part for part in parts if part not in SEGMENTS)


def select_tensors(state_dict: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Select tensors by name from a caller's state dict. Its keys may contain wrapper segments.

    Raises `SurgeryError` for a tensor that is missing, ambiguous or sharded. A process that saves alone must not wait
    for other processes to gather a tensor.
    """
    selected, absent = dict[str, Tensor](), list[str]()
    keys_by_name: dict[str, list[str]] | None = None
    for name in names:
        key: str | None = name
        if name not in state_dict:
            if keys_by_name is None:
                keys_by_name = {}
                for key_in_dict in state_dict:
                    keys_by_name.setdefault(plain_name(key_in_dict), []).append(key_in_dict)
            keys = keys_by_name.get(plain_name(name), [])
            key = keys[0] if len(keys) == 1 else None
        if key is None:
            absent.append(name)
            continue
        tensor = state_dict[key]
        if hasattr(tensor, "full_tensor"):
            raise SurgeryError(
                "the state dict passed as state_dict is sharded",
                where=key,
                why="each process has a part of the tensor (DTensor), and one process saves alone",
                fix="gather it: get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))",
            )
        selected[name] = tensor
    if absent:
        near = next(iter(state_dict), None)
        raise SurgeryError(
            f"the state dict passed as state_dict lacks {len(absent)} tensors of the adapter, such as {absent[0]}",
            why=f"it has {len(state_dict)} keys" + (f", such as {near}" if near is not None else ""),
            fix="pass the model's whole state dict, gathered from all processes; names may differ only in wrapper "
            "segments (module, _orig_mod, _checkpoint_wrapped_module)",
        )
    return selected
