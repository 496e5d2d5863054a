"""Selects module paths by the fields of PEFT's configuration. Works without torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["select_targets", "endings", "pattern_matcher", "pattern_value", "regex_for", "literal_alternatives"]


def endings(path: str) -> Iterator[str]:
    """Yields every name that matches a path: the whole path, and the rest after each dot."""
    yield path
    dot = path.find(".")
    while dot >= 0:
        yield path[dot + 1 :]
        dot = path.find(".", dot + 1)


def select_targets(config: Mapping[str, Any], paths: Iterable[str]) -> set[str]:
    """Select the paths that PEFT's `target_modules` and related fields match. Empty without `target_modules`."""
    targets = config.get("target_modules")
    if not targets:
        return set()
    exclude = config.get("exclude_modules")
    targeted, excluded = _matcher(targets), _matcher(exclude or ())
    saved = [re.compile(rf"(^|.*\.){name}($|\..*)").match for name in config.get("modules_to_save") or ()]
    whole = paths_of(targets)  # PEFT checks the layer only where a name matches the end of a path
    return {
        path
        for path in paths
        if targeted(path)
        and not excluded(path)
        and not any(match(path) for match in saved)
        and (isinstance(targets, str) or path in whole or _in_layers(config, path))
    }


def paths_of(targets: str | Sequence[str]) -> set[str]:
    """Returns the names of a list, which may be whole paths. A single string is a regular expression: empty set."""
    return set() if isinstance(targets, str) else {name for name in targets if isinstance(name, str)}


@functools.lru_cache(maxsize=4096)
def pattern_matcher(pattern: str) -> Callable[[str], object]:
    """Returns the test of a path that PEFT makes with a key of rank_pattern: the path, or its end after a dot, fits."""
    return re.compile(rf"(.*\.)?({pattern})$").match


def pattern_value(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Returns the value of the first of PEFT's patterns (such as rank_pattern) that matches a path."""
    return next((value for key, value in (patterns or {}).items() if pattern_matcher(key)(path)), default)


def regex_for(paths: Sequence[str]) -> str:
    """Returns a target, `re:` and an expression, that matches exactly these paths."""
    return "re:" + "|".join(map(re.escape, paths))


def literal_alternatives(expression: str) -> frozenset[str] | None:
    """Returns the alternatives of an expression that consists of escaped texts and `|`; None for other expressions.

    A set lookup costs the same for three paths and for thousands; the expression would try each alternative.
    """
    if not re.fullmatch(r"(?:\w|\\[^\w|]|\|)*", expression):
        return None
    return frozenset(re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL) for text in expression.split("|"))


def _matcher(targets: str | Sequence[str]) -> Callable[[str], bool]:
    """Returns a function that tells whether a path matches a regular expression, or ends with a listed name."""
    if isinstance(targets, str):
        if (alternatives := literal_alternatives(targets)) is not None:
            return alternatives.__contains__
        form = re.compile(targets)
        return lambda path: form.fullmatch(path) is not None
    names = paths_of(targets)
    return lambda path: not names.isdisjoint(endings(path))


def _in_layers(config: Mapping[str, Any], path: str) -> bool:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or ()
    if layers is None or layers == []:
        return True
    forms = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in ([patterns] if isinstance(patterns, str) else patterns)]
    hits = (re.match(form, path) for form in forms or [r".*?\.[^.]*\.(?P<idx>\d+)\."])
    hit = next((hit for hit in hits if hit), None)
    return hit is not None and int(hit["idx"]) in ([layers] if isinstance(layers, int) else layers)
