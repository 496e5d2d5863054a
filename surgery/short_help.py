"""`help` of a package as one page: pydoc does not print the documentation of every public name of it."""

from __future__ import annotations

import inspect
import sys
from typing import Any

__all__ = ["list_names", "shorten_help"]


def shorten_help(namespace: dict[str, Any]) -> None:
    """Call at the end of a package's `__init__.py` with its `globals()`: `help` shows its docstring alone.

    pydoc prints the whole documentation of each name in `__all__`, which for a large package is thousands of lines.
    Here `__all__` is looked up by the package's `__getattr__`, which does not answer pydoc. All others, such as
    `from surgery import *`, get it. `dir` of the package shows the names in `__all__` alone.
    """
    names: list[str] = namespace.pop("__all__")
    attribute = namespace.get("__getattr__")

    def __getattr__(name: str) -> Any:
        if name == "__all__" and sys._getframe(1).f_globals.get("__name__") != "pydoc":
            return names
        if attribute is not None and name != "__all__":
            return attribute(name)
        raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(names)

    namespace["__getattr__"], namespace["__dir__"] = __getattr__, __dir__


def list_names(namespace: dict[str, Any]) -> None:
    """Add a line for each name in `__all__` to the package's docstring: the first line of the name's own docstring."""
    lines = []
    for name in sorted(namespace["__all__"]):
        value = namespace[name]
        documented = inspect.isclass(value) or inspect.isfunction(value)
        first = ((value.__doc__ if documented else None) or "").strip().partition("\n")[0]
        lines.append(f"    {name:<24} {first}".rstrip())
    namespace["__doc__"] = "\n".join([namespace["__doc__"].rstrip(), "", "The public names:", "", *lines, ""])
