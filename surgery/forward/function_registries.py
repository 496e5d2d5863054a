"""Intercepts functions that a forward looks up in a registry at run time, such as an attention by its name.

No registry is patched. A copy of the forward's function gets stand-ins for the registries among its globals, and only
that copy runs.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

__all__ = ["takes_functions", "with_leaves"]

# How a leaf is called: the function, its arguments, its keyword arguments.
Call = Callable[[Any, tuple, dict[str, Any]], Any]


def with_leaves(function: Any, call: Call, visited: frozenset[int] = frozenset()) -> Any:
    """Copy a function so that functions from its registries run through `call`. Closures of decorators are followed."""
    if not isinstance(function, types.FunctionType) or id(function) in visited:
        return function
    space = function.__globals__
    names = [name for name in function.__code__.co_names if name in space and _is_registry(space[name])]
    cells = function.__closure__ or ()
    inner = tuple(_cell(cell, call, visited | {id(function)}) for cell in cells)
    if not names and all(old is new for old, new in zip(cells, inner, strict=True)):
        return function
    if names:
        space = {**space, **{name: _Registry(space[name], call) for name in names}}
        if "__name__" not in function.__code__.co_names:
            del space["__name__"]  # torch.compile treats globals with `__name__` as that module's globals
    copy = types.FunctionType(function.__code__, space, function.__name__, function.__defaults__, inner or None)
    copy.__kwdefaults__, copy.__module__ = function.__kwdefaults__, function.__module__
    copy.__dict__.update(function.__dict__)
    return copy


def takes_functions(module: nn.Module) -> bool:
    """Whether a module's own forward takes functions from a registry, as transformers' attentions do.

    >>> from torch import nn
    >>> from surgery import takes_functions
    >>> takes_functions(nn.MultiheadAttention(4, 2))
    False

    Args:
        module: The module.
    """
    forward = getattr(module, "_surgery_base", type(module)).forward
    return with_leaves(forward, lambda function, args, kwargs: None) is not forward


def _cell(cell: Any, call: Call, visited: frozenset[int]) -> Any:
    try:
        content = cell.cell_contents
    except ValueError:  # the cell is still empty
        return cell
    wrapped = with_leaves(content, call, visited)
    return cell if wrapped is content else types.CellType(wrapped)


def _is_registry(value: Any) -> bool:
    """Whether a value is a mapping, but not a plain dict, whose values are functions."""
    if isinstance(value, type) or type(value) is dict or not isinstance(value, Mapping):
        return False
    try:
        items = list(value.values())
    except Exception:  # a mapping that can't be listed is not a registry
        return False
    return bool(items) and all(isinstance(item, types.FunctionType) for item in items)


class _Registry:
    """A stand-in for a registry: every function that it returns is a leaf."""

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
