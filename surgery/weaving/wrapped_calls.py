"""Calls of a forward's functions inside wrappers, and functions that a rewrite passes as arguments."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from surgery.weaving.terms import Term

__all__ = ["call_wrapped", "function_terms", "takes_module"]


def call_wrapped(function: Callable[..., Any], around: tuple, *args: Any, **kwargs: Any) -> Any:
    """Call a function inside wrappers. The last wrapper is the outermost."""
    for outer in around:
        function = functools.partial(outer, function)
    return function(*args, **kwargs)


def takes_module(term: Term) -> bool:
    """Whether a term calls a function from a registry. In a traced graph, only such calls have a module argument."""
    if term.op != "call_function" or term.origin:
        return False
    args = term.args[2:] if term.is_wrapped else term.args
    first = args[0] if args else None
    return isinstance(first, Term) and (first.op, first.target) == ("get_attr", "_surgery_self")


def function_terms(value: Any, term: Callable[[HandedOn], Term]) -> Any:
    """Replace functions in arguments by terms, because generated code can't write a function as a constant."""
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return term(HandedOn(value))
    if type(value) in (tuple, list):
        return type(value)(function_terms(item, term) for item in value)
    return {key: function_terms(item, term) for key, item in value.items()} if isinstance(value, dict) else value


class HandedOn:
    """A function that a rewrite passes to another function. Generated code calls this object to get the function."""

    def __init__(self, function: Any):
        self.function = function
        self.__name__ = (
            f"{function.__module__}_{function.__qualname__}".replace(".", "_").replace("<", "").replace(">", "")
        )

    def __call__(self) -> Any:
        return self.function
