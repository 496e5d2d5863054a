"""Examples of other sizes, drawn at random: more rows, and another number of positions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from surgery.errors import SurgeryError
from surgery.tracing.example_call import Observation, observe

__all__ = ["observe_resized"]


def observe_resized(
    model: nn.Module, example: Any, watched: Iterable[nn.Module], seed: str
) -> list[tuple[str, Observation]]:
    """Run an example in other sizes, as far as the model accepts them. Returns the sizes in words with what it saw.

    `seed`: a text from which the sizes are drawn, so that equal plans compare in equal sizes.
    """
    watched, observations = list(watched), []
    for choices in _resized(example, random.Random(seed)):
        for words, resized in choices:
            try:
                observations.append((words, observe(model, resized, watched)))
                break
            except SurgeryError:  # the model does not take inputs of this size
                continue
    return observations


def _resized(example: Any, generator: random.Random) -> Iterator[list[tuple[str, Any]]]:
    """Yields lists of examples in other sizes; the first that the model accepts counts."""
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim()]
    rows = {tensor.shape[0] for tensor in tensors}
    if len(rows) == 1 and (count := rows.pop()):
        more = generator.randint(1, 3)
        yield [(f"{count + more} rows", _changed(example, lambda tensor: _with_rows(tensor, more)))]
    lengths = {tensor.shape[1] for tensor in tensors if _has_positions(tensor)}
    if len(lengths) == 1 and (length := lengths.pop()) > 1:
        shorter, longer = generator.randint(min(2, length - 1), length - 1), length + generator.randint(1, 3)
        order = [shorter, longer] if generator.random() < 0.5 else [longer, shorter]
        yield [(f"length {new}", _changed(example, lambda x, new=new: _in_length(x, length, new))) for new in order]


def _changed(example: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tree_map_only(Tensor, lambda tensor: change(tensor) if tensor.dim() else tensor, example)


def _with_rows(tensor: Tensor, more: int) -> Tensor:
    """More rows, and the rows in the other order."""
    places = [*reversed(range(len(tensor))), *(number % len(tensor) for number in range(more))]
    return tensor[torch.tensor(places, device=tensor.device)]


def _has_positions(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point() or tensor.dim() == 3 and tensor.is_floating_point()


def _in_length(tensor: Tensor, length: int, new: int) -> Tensor:
    """Another number of positions: without the last ones, or with the first ones once more."""
    places = torch.arange(new, device=tensor.device) % length
    for dim in range(1, tensor.dim()):
        if tensor.shape[dim] == length and (dim == 1 or tensor.dim() == 4):
            tensor = tensor.index_select(dim, places)
    return tensor
