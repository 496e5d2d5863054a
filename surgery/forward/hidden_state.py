"""Finds the hidden state in a module's output at each call, because its type may change from call to call.

Plain functions of the output, so that torch.compile and torch.export can trace them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from surgery.errors import SiteError
from surgery.forward.graph_functions import same_dtype

__all__ = ["hidden_of", "with_hidden"]


def hidden_of(output: Any) -> Tensor:
    """Returns the hidden state of an output: the output if it is a tensor, else its first tensor with a dimension.

    >>> import torch
    >>> from surgery import hidden_of
    >>> hidden_of((torch.tensor(0.5), torch.zeros(2, 3))).shape
    torch.Size([2, 3])

    Args:
        output: A tensor, or a tuple, list, mapping or ModelOutput.

    Raises:
        SiteError: The output does not contain a tensor with a dimension.
    """
    return output if isinstance(output, Tensor) else output[_hidden_key(output)]


def with_hidden(output: Any, new: Tensor) -> Any:
    """Returns the output with another hidden state, cast to the dtype of the old one. Other items stay."""
    if isinstance(output, Tensor):
        return same_dtype(new, output)
    key = _hidden_key(output)
    new = same_dtype(new, output[key])
    if isinstance(output, Mapping):
        items = {**output, key: new}
        return items if type(output) is dict else type(output)(**items)
    before, after = output[:key], output[key + 1 :]
    if isinstance(output, list):
        return [*before, new, *after]
    return type(output)(*before, new, *after) if hasattr(output, "_fields") else (*before, new, *after)


def _hidden_key(output: Any) -> Any:
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, (tuple, list)):
        items = enumerate(output)
    for key, item in items:
        if isinstance(item, Tensor) and item.dim() > 0:
            return key
    raise SiteError(
        f"the module returned a {type(output).__name__} without a hidden state",
        why="a hidden state is a tensor, or the first tensor of a tuple, list, mapping or ModelOutput",
        fix="target a module inside it that returns a hidden state",
    )
