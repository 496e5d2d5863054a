"""Examples of other sizes: one row more, and one position less."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from surgery.errors import SurgeryError
from surgery.tracing.example_call import Observation, observe

__all__ = ["observe_resized"]


def observe_resized(model: nn.Module, example: Any, watched: Iterable[nn.Module]) -> list[tuple[str, Observation]]:
    """Run an example in other sizes, as far as the model accepts them. Returns the sizes in words with what it saw."""
    watched, observations = list(watched), []
    for words, resized in _resized(example):
        try:
            observations.append((words, observe(model, resized, watched)))
        except SurgeryError:  # the model does not take inputs of this size
            continue
    return observations


def _resized(example: Any) -> Iterator[tuple[str, Any]]:
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim()]
    rows = {tensor.shape[0] for tensor in tensors}
    if len(rows) == 1 and (count := rows.pop()):
        yield f"{count + 1} rows", _changed(example, lambda tensor: _with_row(tensor))
    lengths = {tensor.shape[1] for tensor in tensors if _has_positions(tensor)}
    if len(lengths) == 1 and (length := lengths.pop()) > 1:
        yield f"length {length - 1}", _changed(example, lambda tensor: _shortened(tensor, length))


def _changed(example: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tree_map_only(Tensor, lambda tensor: change(tensor) if tensor.dim() else tensor, example)


def _with_row(tensor: Tensor) -> Tensor:
    """One row more, and the rows in the other order."""
    return torch.cat([tensor.flip(0), tensor[:1]])


def _has_positions(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point() or tensor.dim() == 3 and tensor.is_floating_point()


def _shortened(tensor: Tensor, length: int) -> Tensor:
    for dim in range(1, tensor.dim()):
        if tensor.shape[dim] == length and (dim == 1 or tensor.dim() == 4):
            tensor = tensor.narrow(dim, 0, length - 1)
    return tensor
