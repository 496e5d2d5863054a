"""Checks of a rule's fields that many methods share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery import Rule, RuleError
from surgery.rules._shared import path_patterns


def whole(rule: Rule, *fields: str, least: int = 1, optional: bool = False) -> None:
    for field in fields:
        value = getattr(rule, field)
        if optional and value is None:
            continue
        if type(value) is not int or value < least:
            raise rule.bad(field, f"a whole number from {least}")


def numbers(rule: Rule, *fields: str, low: float = -math.inf, high: float = math.inf) -> None:
    for field in fields:
        value = getattr(rule, field)
        if type(value) not in (int, float) or not low < value < high:
            raise rule.bad(field, "a number" if low == -high else f"a number between {low:g} and {high:g}")


def positive(rule: Rule, *fields: str) -> None:
    for field in fields:
        value = getattr(rule, field)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise rule.bad(field, "a number above 0")


def chance(rule: Rule, *fields: str) -> None:
    for field in fields:
        value = getattr(rule, field)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise rule.bad(field, "a probability from 0 to below 1")


def flag(rule: Rule, *fields: str) -> None:
    for field in fields:
        if type(getattr(rule, field)) is not bool:
            raise rule.bad(field, "true or false")


def one_of(rule: Rule, field: str, *choices: Any) -> None:
    if getattr(rule, field) not in choices:
        raise rule.bad(field, f"one of {', '.join(map(repr, choices))}")


def either(rule: Rule, field: str, other: str) -> None:
    whole(rule, field, other, least=0)
    if (getattr(rule, field) == 0) == (getattr(rule, other) == 0):
        raise rule.bad(field, f"right: give either {field} or {other}, and make the other 0")


def patterns(rule: Rule, *fields: str) -> None:
    """Checks that each field is a mapping from path patterns (as PEFT's rank_pattern), or None."""
    for field in fields:
        mapping = getattr(rule, field)
        if mapping is not None and not (isinstance(mapping, Mapping) and all(map(path_patterns.compiles, mapping))):
            raise rule.bad(field, "a mapping from path suffixes or regular expressions")


def whole_patterns(rule: Rule, *fields: str) -> None:
    """Checks that each field is a mapping from path patterns to whole numbers from 1, or None."""
    patterns(rule, *fields)
    for field in fields:
        if not all(type(number) is int and number >= 1 for number in (getattr(rule, field) or {}).values()):
            raise rule.bad(field, "a mapping to whole numbers from 1")


def unused_patterns(rule: Rule, paths: Sequence[str], *fields: str) -> Iterable[RuleError]:
    """Returns problems for `Rule.review`: patterns that match none of a rule's sites."""
    for field in fields:
        for key in path_patterns.unused(getattr(rule, field) or {}, paths):
            what = f"{rule.label}: {field} has {key!r}, which fits none of its {len(paths)} sites"
            why, fix = _why_unused(field, key, paths)
            yield RuleError(what, why=why, fix=fix)


def _why_unused(field: str, key: str, paths: Sequence[str]) -> tuple[str, str]:
    """Why a pattern fits no path, and what to write."""
    plain = key.removeprefix("re:")
    inner = next((each for each in (plain, rf"{plain}\..*") if not path_patterns.unused([each], paths)), None)
    remedy = f"write {inner!r}" if inner and inner != key else f"correct it, or leave it out of {field}"
    if key != plain:
        return f"a key of {field} is the end of a path or a regular expression, without 're:' before it", remedy
    if inner:
        return f"a key is the end of a path, and {key!r} is inside of paths", remedy
    return "a key is the end of a path, from a dot on, or a regular expression for it", remedy
