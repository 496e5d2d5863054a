"""Functions of rewrite rules: by their qualified names in data, imported only when a plan needs them."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from surgery import RuleError

__all__ = ["accepted", "call_with", "is_name", "name_of", "resolve"]

Function = Callable[..., Any]


def is_name(value: Any) -> bool:
    """Whether a value is a qualified name, such as "package.module.function"."""
    return isinstance(value, str) and "." in value and all(part.isidentifier() for part in value.split("."))


def name_of(function: Any) -> str | None:
    """Returns the qualified name by which a function can be imported, or None."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not name or module == "__main__" or module not in sys.modules:
        return None
    value: Any = sys.modules[module]
    for part in name.split("."):
        value = getattr(value, part, None)
    return f"{module}.{name}" if value is function and is_name(f"{module}.{name}") else None


def resolve(function: Function | str) -> Function:
    """Returns a function, imported if it is a name.

    Raises:
        RuleError: There is no such function.
    """
    if not isinstance(function, str):
        return function
    parts = function.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if error.name and not f"{'.'.join(parts[:count])}.".startswith(f"{error.name}."):
                raise RuleError(f"importing {function} fails", why=f"{type(error).__name__}: {error}") from error
            continue
        for part in parts[count:]:
            value = getattr(value, part, None)
        if callable(value):
            return value
        break
    raise RuleError(
        f"{function} is not a function that can be imported",
        why="a rule from data names its functions as package.module.function",
        fix="install the package that has the function, or correct the name",
    )


def accepted(function: Function) -> tuple[list[str], list[str], bool]:
    """Returns the names of a function's parameters, of those without a default, and whether it takes `**names`."""
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    starred = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return [p.name for p in named], [p.name for p in named if p.default is p.empty], starred


def call_with(function: Function, values: Mapping[str, Any]) -> Any:
    """Call a function with those of the values that it has a parameter for."""
    names, _, starred = accepted(function)
    return function(**(values if starred else {name: values[name] for name in names if name in values}))
