"""Finds objects of given types inside another object, and copies nested values without shared memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["contents", "copied"]


def contents(value: Any, *kinds: type) -> Iterator[Any]:
    """Yields the objects of these types inside an object, each once.

    >>> list(contents({"a": [1.5, {"b": 2}]}, int))
    [2]
    """
    return _contents(value, kinds, set())


def _contents(value: Any, kinds: tuple[type, ...], seen: set[int]) -> Iterator[Any]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, kinds):
        yield value
        return
    items: list[Any] = list(value.values()) if isinstance(value, Mapping) else []
    items += value if isinstance(value, (list, tuple, set)) else []
    items += vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) else []
    for item in items:
        if not isinstance(item, _PLAIN) or isinstance(item, kinds):
            yield from _contents(item, kinds, seen)


_PLAIN = (str, int, float, type(None))


def copied(value: Any) -> Any:
    """Returns a copy that shares no memory: tensors are cloned, containers rebuilt, other objects deep-copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(copied(item) for item in value)
    if isinstance(value, dict) and type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (str, int, float, type(None), nn.Module)):
        return value
    # Clone tensors first, because deepcopy rejects tensors with a grad_fn, such as those in a KV cache.
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in contents(value, Tensor)}
    return copy.deepcopy(value, memo)
