"""Arguments of fx nodes in plain containers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

__all__ = ["plain"]


def plain(value: Any, shown: Callable[[fx.Node], Any]) -> Any:
    """An argument of a node of fx in plain containers, with what `shown` gives for nodes."""
    if isinstance(value, fx.Node):
        return shown(value)
    if isinstance(value, (tuple, list)):
        items = [plain(item, shown) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {key: plain(item, shown) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(plain(item, shown) for item in (value.start, value.stop, value.step)))
    return value
