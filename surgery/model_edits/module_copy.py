"""Copies a part of a model, such as a layer. What the part shares with the rest of the model stays shared."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

__all__ = ["copy_part", "is_config"]


def copy_part(root: nn.Module, part: nn.Module, share_weights: bool, shared: Iterable[Any] = ()) -> nn.Module:
    """Return a copy of a part of a model.

    Modules and tensors of the part that also occur elsewhere in the model stay the same objects, and so do the model
    itself, which hooks may refer to, and configurations.

    Args:
        root: the model.
        part: the module to copy.
        share_weights: whether the copy has the part's own tensors in new modules.
        shared: further objects that the copy must not copy.
    """
    memo: dict[int, Any] = {id(item): item for item in (*shared, *_outside(root, part))}
    memo[id(root)] = root
    for module in root.modules():
        memo |= {id(value): value for value in module.__dict__.values() if is_config(value)}
    if share_weights:
        tensors = (*part.parameters(), *part.buffers())
        memo |= {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(part, memo)


def _outside(root: nn.Module, part: nn.Module) -> Iterator[Any]:
    """Every module and tensor of a model that is reached without going through a part."""
    waiting, seen = [root], {id(part)}
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        yield from (
            tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None
        )
        waiting += [child for child in module._modules.values() if child is not None]


def is_config(value: Any) -> bool:
    """Whether a value is a configuration of transformers, or of a class that has the same methods."""
    return callable(getattr(value, "to_dict", None)) and hasattr(value, "model_type")
