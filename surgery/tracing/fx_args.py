"""Converts arguments of fx nodes to plain containers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

__all__ = ["replace_nodes"]


def replace_nodes(value: Any, convert: Callable[[fx.Node], Any]) -> Any:
    """Returns an argument in tuples, lists, dicts and slices instead of those of fx, with each node converted."""
    if isinstance(value, fx.Node):
        return convert(value)
    if isinstance(value, (tuple, list)):
        items = [replace_nodes(item, convert) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {key: replace_nodes(item, convert) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(replace_nodes(item, convert) for item in (value.start, value.stop, value.step)))
    return value
