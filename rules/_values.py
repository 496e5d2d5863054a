"""Checks of fields' values that many rules make."""

from __future__ import annotations

from typing import Any

from surgery import Rule


def whole(rule: Rule, *fields: str, least: int = 1, optional: bool = False) -> None:
    for field in fields:
        value = getattr(rule, field)
        if optional and value is None:
            continue
        if type(value) is not int or value < least:
            raise rule.bad(field, f"a whole number from {least}")


def numbers(rule: Rule, *fields: str, low: float = float("-inf"), high: float = float("inf")) -> None:
    for field in fields:
        value: Any = getattr(rule, field)
        if type(value) not in (int, float) or not low < value < high:
            raise rule.bad(field, "a number" if low == -high else f"a number between {low:g} and {high:g}")


def chance(rule: Rule, field: str = "dropout") -> None:
    value: Any = getattr(rule, field)
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise rule.bad(field, "a probability from 0 to below 1")


def one_of(rule: Rule, field: str, *values: Any) -> None:
    if getattr(rule, field) not in values:
        raise rule.bad(field, f"one of {', '.join(map(repr, values))}")
