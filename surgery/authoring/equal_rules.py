"""A mapping from rules to values. A lookup among a thousand rules takes as long as among two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from surgery.authoring.rule import Rule

__all__ = ["ByRule"]

T = TypeVar("T")


class ByRule(Generic[T]):
    """Maps rules to values; equal rules share a value. Rules that can't be hashed are compared one by one."""

    def __init__(self) -> None:
        self._hashed: dict[Rule, T] = {}
        self._others: list[tuple[Rule, T]] = []
        self._seen: dict[int, tuple[Rule, T]] = {}  # rules by identity

    def get(self, rule: Rule, make: Callable[[], T]) -> T:
        """Returns the value of this rule or an equal rule. Without a value, `make` creates it."""
        seen = self._seen.get(id(rule))
        if seen is None:
            seen = self._seen[id(rule)] = (rule, self._by_value(rule, make))
        return seen[1]

    def _by_value(self, rule: Rule, make: Callable[[], T]) -> T:
        try:
            if rule not in self._hashed:
                self._hashed[rule] = make()
            return self._hashed[rule]
        except TypeError:  # a field that can't be hashed
            pass
        for other, value in self._others:
            if other == rule:
                return value
        self._others.append((rule, new := make()))
        return new
