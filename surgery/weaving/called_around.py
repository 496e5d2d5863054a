"""Functions of a forward with others around them, and functions that a rewrite hands to another."""

from __future__ import annotations

import functools
import types
from typing import Any

from surgery.weaving.terms import Term

__all__ = ["called_around", "handing", "takes_module"]


def called_around(function: Any, around: tuple, *args: Any, **kwargs: Any) -> Any:
    """`function(*args)` with functions around it, the last one outermost."""
    for outer in around:
        function = functools.partial(outer, function)
    return function(*args, **kwargs)


def takes_module(term: Term) -> bool:
    """Whether it calls a function from a registry: the only ones in a traced graph that are given a module."""
    if term.op != "call_function" or term.origin:
        return False
    args = term.args[2:] if term.around else term.args
    first = args[0] if args else None
    return isinstance(first, Term) and (first.op, first.target) == ("get_attr", "_surgery_self")


def handing(value: Any, term: Any) -> Any:
    """Arguments in which functions are terms: code has no other way to write them."""
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return term(HandedOn(value))
    if type(value) in (tuple, list):
        return type(value)(handing(item, term) for item in value)
    return {key: handing(item, term) for key, item in value.items()} if isinstance(value, dict) else value


class HandedOn:
    """A function that a rewrite gives to another one: a call of this says it."""

    def __init__(self, function: Any):
        self.function = function
        self.__name__ = (
            f"{function.__module__}_{function.__qualname__}".replace(".", "_").replace("<", "").replace(">", "")
        )

    def __call__(self) -> Any:
        return self.function
