"""Values by rule: equal rules have one value, found in the same time among a thousand rules as among two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from surgery.authoring.rule import Rule

__all__ = ["ByRule"]

T = TypeVar("T")


class ByRule(Generic[T]):
    """A mapping from rules. A rule whose fields can't be hashed is compared with the others of its sort."""

    def __init__(self) -> None:
        self._hashed: dict[Rule, T] = {}
        self._others: list[tuple[Rule, T]] = []
        self._seen: dict[int, tuple[Rule, T]] = {}  # the very objects that were asked for

    def get(self, rule: Rule, make: Callable[[], T]) -> T:
        """The value of this rule, or of an equal one; what `make` gives where there is none yet."""
        seen = self._seen.get(id(rule))
        if seen is None:
            seen = self._seen[id(rule)] = (rule, self._found(rule, make))
        return seen[1]

    def _found(self, rule: Rule, make: Callable[[], T]) -> T:
        try:
            if rule not in self._hashed:
                self._hashed[rule] = make()
            return self._hashed[rule]
        except TypeError:  # a field that can't be hashed
            pass
        for other, value in self._others:
            if other == rule:
                return value
        self._others.append((rule, made := make()))
        return made
