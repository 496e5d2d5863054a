"""Paths of modules, and which of them PEFT's configuration means. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["chosen", "endings", "patterned", "regular", "spelled"]


def endings(path: str) -> Iterator[str]:
    """The names that fit a path: all of it, and what follows each of its dots."""
    yield path
    dot = path.find(".")
    while dot >= 0:
        yield path[dot + 1 :]
        dot = path.find(".", dot + 1)


def chosen(config: Mapping[str, Any], paths: Iterable[str]) -> set[str]:
    """Those that PEFT's `target_modules` and the fields around it mean; none where they name none."""
    targets = config.get("target_modules")
    if not targets:
        return set()
    exclude = config.get("exclude_modules")
    targeted, excluded = _asking(targets), _asking(exclude or ())
    saved = [re.compile(rf"(^|.*\.){name}($|\..*)").match for name in config.get("modules_to_save") or ()]
    whole = paths_of(targets)  # PEFT asks for a layer only where a name is the end of a path
    return {
        path
        for path in paths
        if targeted(path)
        and not excluded(path)
        and not any(held(path) for held in saved)
        and (isinstance(targets, str) or path in whole or _in_layers(config, path))
    }


def paths_of(targets: str | Sequence[str]) -> set[str]:
    """The names of a list that may be whole paths; a single text is an expression."""
    return set() if isinstance(targets, str) else {name for name in targets if isinstance(name, str)}


def patterned(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first of PEFT's patterns (rank_pattern) that fits a path."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)


def regular(paths: Sequence[str]) -> str:
    """A regular expression for exactly these paths."""
    return "re:" + "|".join(map(re.escape, paths))


def spelled(expression: str) -> frozenset[str] | None:
    """The texts that an expression of escaped texts and `|` lists; None for any other expression.

    Looking a path up in a set costs the same for three texts and for thousands; the expression tries each in turn.
    """
    if not re.fullmatch(r"(?:\w|\\[^\w|]|\|)*", expression):
        return None
    return frozenset(re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL) for text in expression.split("|"))


def _asking(targets: str | Sequence[str]) -> Callable[[str], bool]:
    """Whether a path is meant: by a regular expression, or by names that are its endings."""
    if isinstance(targets, str):
        if (listed := spelled(targets)) is not None:
            return listed.__contains__
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
