"""The first input of a forward that names none: `forward(self, *args, **kwargs)` takes it by place or by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["FIRST", "first_given", "first_names", "hidden_first", "starred_of", "with_first"]

# The name under which rules know that input: no parameter can be called so.
FIRST = "*"


def hidden_first(signature: inspect.Signature) -> bool:
    """Whether the first input of a forward stands in its `*args` or `**kwargs`."""
    first = next(iter(signature.parameters.values()), None)
    return first is not None and first.kind in (first.VAR_POSITIONAL, first.VAR_KEYWORD)


def starred_of(signature: inspect.Signature) -> dict[str, str]:
    """The names of a signature's `*args` and `**kwargs`, by "*" and "**"."""
    kinds = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return {kinds[p.kind]: name for name, p in signature.parameters.items() if p.kind in kinds}


def first_given(names: tuple[str, ...], args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The first input of a call: by place, else under one of these names."""
    return args[0] if args else kwargs[_named(names, kwargs)]


def with_first(
    names: tuple[str, ...], new: Any, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """The inputs of a call with another first one."""
    if args:
        return (new, *args[1:]), dict(kwargs)
    return args, {**kwargs, _named(names, kwargs): new}


def _named(names: tuple[str, ...], kwargs: Mapping[str, Any]) -> str:
    found = next((name for name in names if name in kwargs), None)
    if found is None and len(kwargs) == 1:
        found = next(iter(kwargs))
    if found is None:
        given = f"it is given {', '.join(kwargs)}" if kwargs else "it is given none"
        raise TypeError(f"the call does not tell which input is the first: {given}")
    return found


@functools.cache
def first_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """What the forwards of a class and its bases call their first input."""
    found = []
    for base in cls.__mro__:
        if "forward" in vars(base):
            try:
                parameters = list(inspect.signature(vars(base)["forward"]).parameters.values())[1:2]
            except (TypeError, ValueError):
                continue
            found += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return tuple(dict.fromkeys(found))
