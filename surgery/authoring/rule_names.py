"""Rule classes by name: those that are imported, and those that installed packages offer."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from surgery.errors import RuleError, near_misses
from surgery.patterns.pattern import qualified_name

__all__ = ["register", "registered"]

_classes: dict[str, type[Any]] = {}


def register(name: str, cls: type[Any]) -> None:
    """Give a rule class its name. Raises `RuleError` where another class has it."""
    taken = _classes.get(name)
    if taken is not None and qualified_name(taken) != qualified_name(cls):
        raise RuleError(f"the rule name {name!r} is taken by {qualified_name(taken)}", fix="choose another name")
    _classes[name] = cls


def registered(name: str) -> type[Any]:
    """The rule class of a name: one already imported, else the one an installed package offers."""
    if name not in _classes:
        for entry in metadata.entry_points(group="surgery.rules", name=name):
            entry.load()
    if name in _classes:
        return _classes[name]
    known = set(_classes) | {entry.name for entry in metadata.entry_points(group="surgery.rules")}
    raise RuleError(
        f"there is no rule {name!r}",
        why=near_misses(name, known) or f"known rules: {', '.join(sorted(known))}",
        fix="import or install the package that brings it",
    )
