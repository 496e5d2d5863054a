"""Functions that a forward looks up in a registry at run time, such as an attention by its name: each is one node.

No registry is patched. The forward's function is made anew with stand-ins for the registries among its globals, and
only that copy runs.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

__all__ = ["takes_functions", "with_leaves"]

# How a leaf is called: the function, its arguments, its keyword arguments.
Call = Callable[[Any, tuple, dict[str, Any]], Any]


def with_leaves(function: Any, call: Call, seen: frozenset[int] = frozenset()) -> Any:
    """The function with its registries giving leaves. A decorator's closure, which holds what it wraps, is followed."""
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return function
    space = function.__globals__
    names = [name for name in function.__code__.co_names if name in space and _is_registry(space[name])]
    cells = function.__closure__ or ()
    inner = tuple(_cell(cell, call, seen | {id(function)}) for cell in cells)
    if not names and all(one is other for one, other in zip(cells, inner, strict=True)):
        return function
    if names:
        space = {**space, **{name: _Registry(space[name], call) for name in names}}
        if "__name__" not in function.__code__.co_names:
            del space["__name__"]  # torch.compile takes globals with a name for that module's own
    made = types.FunctionType(function.__code__, space, function.__name__, function.__defaults__, inner or None)
    made.__kwdefaults__, made.__module__ = function.__kwdefaults__, function.__module__
    made.__dict__.update(function.__dict__)
    return made


def takes_functions(module: nn.Module) -> bool:
    """Whether a module's own forward takes functions from a registry, as transformers' attentions do.

    >>> from torch import nn
    >>> from surgery import takes_functions
    >>> takes_functions(nn.MultiheadAttention(4, 2))
    False
    """
    forward = getattr(module, "_surgery_base", type(module)).forward
    return with_leaves(forward, lambda function, args, kwargs: None) is not forward


def _cell(cell: Any, call: Call, seen: frozenset[int]) -> Any:
    try:
        content = cell.cell_contents
    except ValueError:  # not filled yet
        return cell
    made = with_leaves(content, call, seen)
    return cell if made is content else types.CellType(made)


def _is_registry(value: Any) -> bool:
    """A mapping of a class of its own that holds functions."""
    if isinstance(value, type) or type(value) is dict or not isinstance(value, Mapping):
        return False
    try:
        items = list(value.values())
    except Exception:  # somebody's mapping that can't be listed is none of ours
        return False
    return bool(items) and all(isinstance(item, types.FunctionType) for item in items)


class _Registry:
    """A registry whose functions are leaves, whichever of its methods gives them."""

    def __init__(self, real: Any, call: Call):
        self._real, self._call = real, call

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        return (lambda *args, **kwargs: self._leaf(value(*args, **kwargs))) if callable(value) else value

    def __getitem__(self, key: Any) -> Any:
        return self._leaf(self._real[key])

    def __contains__(self, key: Any) -> bool:
        return key in self._real

    def _leaf(self, function: Any) -> Any:
        if not isinstance(function, types.FunctionType):
            return function
        return lambda *args, **kwargs: self._call(function, args, kwargs)
