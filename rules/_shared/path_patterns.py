"""Values by patterns of paths, as PEFT's rank_pattern: path suffixes or regular expressions, also thousands."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from surgery.patterns.paths import pattern_matcher


def first(mapping: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the path."""
    if not mapping:
        return default
    key = _patterns_of(mapping).first(path)
    return default if key is None else mapping[key]


def fits(key: str, path: str) -> bool:
    return pattern_matcher(key)(path) is not None


def unused(keys: Iterable[str], paths: Sequence[str]) -> list[str]:
    """Returns the patterns that match none of the paths."""
    endings = {ending for path in paths for ending in _endings(path)}
    there = set(paths)
    return [
        key
        for key in keys
        if _text(key)[0] not in endings
        and (
            there.isdisjoint(whole) if (whole := _whole(key)) is not None else not any(map(pattern_matcher(key), paths))
        )
    ]


def compiles(pattern: Any) -> bool:
    try:
        return isinstance(pattern, str) and (_text(pattern)[0] is not None or re.compile(pattern) is not None)
    except re.error:
        return False


def _patterns_of(mapping: Mapping[str, Any]) -> _Patterns:
    """Returns the compiled patterns of a rule's mapping, which does not change. They are cached by the mapping's id."""
    cached = _cache.get(id(mapping))
    if cached is None or cached[0] is not mapping or len(mapping) != len(cached[1].keys):
        if len(_cache) >= _MOST:
            _cache.clear()
        cached = _cache[id(mapping)] = (mapping, _patterns(tuple(mapping)))
    return cached[1]


_cache: dict[int, tuple[Mapping[str, Any], _Patterns]] = {}  # by id; holds the mapping, so the id stays its own
_MOST = 32


@functools.lru_cache(maxsize=32)
def _patterns(keys: tuple[str, ...]) -> _Patterns:
    return _Patterns(keys)


class _Patterns:
    """Patterns in their order. Patterns that are plain names are looked up, and not tried one by one."""

    def __init__(self, keys: tuple[str, ...]):
        self.keys = keys
        self.forms: list[tuple[int, Callable[[str], Any]]] = []
        self.names: dict[tuple[int, ...], dict[str, int]] = {}  # by where dots are that stand for any character
        self.whole: dict[str, int] = {}  # whole paths
        for index, key in enumerate(keys):
            if (paths := _whole(key)) is not None:
                for path in paths:
                    self.whole.setdefault(path, index)
                continue
            text, dots = _text(key)
            if text is None:
                self.forms.append((index, pattern_matcher(key)))
            else:
                self.names.setdefault((len(text), *dots), {}).setdefault(text, index)

    def first(self, path: str) -> str | None:
        indices = [next((index for index, form in self.forms if form(path)), len(self.keys))]
        indices.append(self.whole.get(path, len(self.keys)))
        for ending in _endings(path):
            for (size, *dots), named in self.names.items():
                if size == len(ending):
                    text = list(ending)
                    for dot in dots:
                        text[dot] = "."
                    indices += [named[name]] if (name := "".join(text)) in named else []
        return self.keys[min(indices)] if min(indices) < len(self.keys) else None


def _whole(key: str) -> list[str] | None:
    """Returns the paths of a pattern that lists whole paths, `^(?:a|b)` with only escaped texts, or None."""
    if not re.fullmatch(r"\^\(\?:(?:\w|\\[^\w|]|\|)*\)", key):
        return None
    return [re.sub(r"\\(.)", r"\1", text) for text in key[4:-1].split("|")]


def _text(key: str) -> tuple[str | None, list[int]]:
    """Returns the text of a pattern of plain characters and dots, and the places of its unescaped dots, or None."""
    if not re.fullmatch(r"(?:[\w.\-]|\\\W)*", key):
        return None, []
    pieces = re.findall(r"\\\W|.", key)
    return "".join(piece[-1] for piece in pieces), [index for index, piece in enumerate(pieces) if piece == "."]


def _endings(path: str) -> Iterable[str]:
    parts = path.split(".")
    return (".".join(parts[index:]) for index in range(len(parts)))
