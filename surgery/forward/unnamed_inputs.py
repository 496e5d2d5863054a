"""Finds the first input of a forward without named inputs, such as `forward(self, *args, **kwargs)`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["FIRST", "first_input", "first_names", "hidden_first", "starred_of", "with_first_input"]

# The name of this input in rules. A parameter can't have this name.
FIRST = "*"


def hidden_first(signature: inspect.Signature) -> bool:
    """Whether the first input of a forward is part of its `*args` or `**kwargs`."""
    first = next(iter(signature.parameters.values()), None)
    return first is not None and first.kind in (first.VAR_POSITIONAL, first.VAR_KEYWORD)


def starred_of(signature: inspect.Signature) -> dict[str, str]:
    """Returns the names of a signature's `*args` and `**kwargs`, by "*" and "**"."""
    kinds = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return {kinds[p.kind]: name for name, p in signature.parameters.items() if p.kind in kinds}


def first_input(names: tuple[str, ...], args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Returns the first input of a call: the first positional argument, else the one with one of these names."""
    return args[0] if args else kwargs[_named(names, kwargs)]


def with_first_input(
    names: tuple[str, ...], new: Any, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Returns the arguments of a call with another first input."""
    if args:
        return (new, *args[1:]), dict(kwargs)
    return args, {**kwargs, _named(names, kwargs): new}


def _named(names: tuple[str, ...], kwargs: Mapping[str, Any]) -> str:
    first = next((name for name in names if name in kwargs), None)
    if first is None and len(kwargs) == 1:
        first = next(iter(kwargs))
    if first is None:
        arguments = f"its arguments are {', '.join(kwargs)}" if kwargs else "it does not have arguments"
        raise TypeError(f"the first input of the call is ambiguous: {arguments}")
    return first


@functools.cache
def first_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """Returns the names of the first input in the forwards of a class and its bases."""
    names = []
    for base in cls.__mro__:
        if "forward" in vars(base):
            try:
                parameters = list(inspect.signature(vars(base)["forward"]).parameters.values())[1:2]
            except (TypeError, ValueError):
                continue
            names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return tuple(dict.fromkeys(names))
