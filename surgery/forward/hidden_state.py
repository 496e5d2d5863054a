"""The hidden state in what a module returns, found at each call: the same module may return a tensor in one call and
a tuple or a ModelOutput in the next. Plain functions of the output, so that compile and export see through them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from surgery.errors import SiteError
from surgery.forward.graph_functions import same_dtype

__all__ = ["hidden_of", "with_hidden"]


def hidden_of(output: Any) -> Tensor:
    """The output itself where it is a tensor, else the first tensor with a dimension in it (so, no scalar loss)."""
    return output if isinstance(output, Tensor) else output[_place(output)]


def with_hidden(output: Any, new: Tensor) -> Any:
    """The output with another tensor in the hidden state's place, in its dtype; the rest as it was."""
    if isinstance(output, Tensor):
        return _as(new, output)
    place = _place(output)
    new = _as(new, output[place])
    if isinstance(output, Mapping):
        items = {**output, place: new}
        return items if type(output) is dict else type(output)(**items)
    before, after = output[:place], output[place + 1 :]
    if isinstance(output, list):
        return [*before, new, *after]
    return type(output)(*before, new, *after) if hasattr(output, "_fields") else (*before, new, *after)


def _as(new: Tensor, old: Tensor) -> Tensor:
    return same_dtype(new, old)


def _place(output: Any) -> Any:
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, (tuple, list)):
        items = enumerate(output)
    for place, item in items:
        if isinstance(item, Tensor) and item.dim() > 0:
            return place
    raise SiteError(
        f"the module returned a {type(output).__name__} with no hidden state in it",
        why="a hidden state is a tensor, or the first tensor of a tuple, list, mapping or ModelOutput",
        fix="target a module inside it that returns one",
    )
