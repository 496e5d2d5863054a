"""Looks up rule classes by name: imported classes, and classes that installed packages offer."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from surgery.errors import RuleError, near_misses, qualified_name

__all__ = ["SLOT", "check_named", "register", "registered"]

SLOT = "-slot"  # the ending of rules that only exported files have
LIBRARY = "surgery.rules."

_classes: dict[str, type[Any]] = {}


def register(name: str, cls: type[Any]) -> None:
    """Register a rule class under a name. Raises `RuleError` if another class has the name."""
    registered = _classes.get(name)
    if registered is not None and qualified_name(registered) != qualified_name(cls):
        raise RuleError(f"the rule name {name!r} is taken by {qualified_name(registered)}", fix="choose another name")
    _classes[name] = cls


def check_named(cls: type[Any]) -> None:
    """Raise `RuleError` if a rule class has no name of its own, because files could not name it."""
    if "name" not in vars(cls):
        raise RuleError(
            f"{cls.__qualname__} can't be written to a file",
            why="the class has no name of its own in files: it is not decorated with @rule",
            fix=f'put @rule("its-name") above the class; rule("its-name")({cls.__name__}) names a class that exists',
        )


def registered(name: str) -> type[Any]:
    """Returns the rule class of a name. If it is not imported, its installed package is imported first."""
    if name not in _classes:
        for entry in metadata.entry_points(group="surgery.rules", name=name):
            entry.load()
    if name in _classes:
        return _classes[name]
    offered = {entry.name for entry in metadata.entry_points(group="surgery.rules")}
    # The library registers companions, too, which have no place in a file by themselves.
    own = {each for each, cls in _classes.items() if not cls.__module__.startswith(LIBRARY)}
    names = sorted(each for each in offered | own if not each.endswith(SLOT))
    raise RuleError(
        f"{name!r} is not the name of a rule",
        why=near_misses(name, names) or f"known rules: {', '.join(names)}",
        fix="import or install the package that defines it",
    )
