"""Finds objects of given types inside another object: in lists, mappings and attributes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

__all__ = ["contents"]


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
