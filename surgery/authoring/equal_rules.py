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
        self._unhashed: list[tuple[Rule, T]] = []
        self._by_identity: dict[int, tuple[Rule, T]] = {}

    def get(self, rule: Rule, make: Callable[[], T]) -> T:
        """Returns the value of this rule or an equal rule. Without a value, `make` creates it."""
        entry = self._by_identity.get(id(rule))
        if entry is None:
            entry = self._by_identity[id(rule)] = (rule, self._equal_value(rule, make))
        return entry[1]

    def _equal_value(self, rule: Rule, make: Callable[[], T]) -> T:
        try:
            if rule not in self._hashed:
                self._hashed[rule] = make()
            return self._hashed[rule]
        except TypeError:  # a field that can't be hashed
            pass
        for other, value in self._unhashed:
            if other == rule:
                return value
        self._unhashed.append((rule, new := make()))
        return new
