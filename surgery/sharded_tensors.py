"""Tensors that are split between processes: DTensors (FSDP2, tensor parallelism) and views of flat tensors (FSDP1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError

__all__ = ["is_flattened", "copy_into", "refuse_split", "sharding_of"]


def sharding_of(module: nn.Module) -> tuple[str, str] | None:
    """Returns why a module's own parameters are not whole in this process (why, what to do), or None."""
    if any(type(tensor) is not nn.Parameter and hasattr(tensor, "device_mesh") for tensor in _own_parameters(module)):
        why, name = "its parameters are sharded (DTensor)", "fully_shard"
    elif any(map(is_flattened, _own_parameters(module))) or any(
        [_is_flat_view(value) for value in module.__dict__.values()]
    ):
        why, name = "its parameters are parts of a flat one that is sharded (FSDP)", "FSDP, which needs use_orig_params"
    else:
        return None
    return why, f"do this before {name}; or save_adapter, and load it on a model that is not sharded"


def _own_parameters(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in module._parameters.values() if tensor is not None]


def is_flattened(tensor: Tensor) -> bool:
    """Whether FSDP1 has made this parameter a part of a flat parameter."""
    return getattr(tensor, "_fsdp_flattened", False)


def _is_flat_view(value: Any) -> bool:
    """Whether FSDP1 stored a view in a module's attribute, which it does without use_orig_params."""
    return isinstance(value, Tensor) and getattr(value._base, "_is_flat_param", False)


def copy_into(tensor: Tensor, new: Tensor) -> None:
    """Copy numbers into a tensor of the model in place. If it is sharded, each process copies its part."""
    if is_flattened(tensor):
        raise SurgeryError(
            "numbers can't be put into these tensors",
            why="FSDP has made them parts of a flat parameter that is sharded",
            fix="put them in before FSDP",
        )
    mesh: Any = getattr(tensor, "device_mesh", None)
    if mesh is not None and not hasattr(new, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = tensor
        new = distribute_tensor(new.to(tensor.device), mesh, sharded.placements)
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.detach().copy_(new)


def refuse_split(module: nn.Module, name: str, parameter: Any) -> None:
    """Raise `SurgeryError` if tensor parallelism is about to split a parameter of a rewritten module.

    It would leave adapters whole, and then fail at their names with the model half split.
    """
    if hasattr(parameter, "device_mesh") and not hasattr(module._parameters.get(name), "device_mesh"):
        raise SurgeryError(
            f"parallelize_module can't split a rewritten {type(module).__name__}",
            why=f"its {name} would be split and its adapters' tensors not, so that they no longer fit",
            fix="merge(model) and forget(model) first, leave this module out of the plan, or shard with fully_shard",
        )
