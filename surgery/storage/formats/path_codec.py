"""Paths of modules as parts of keys: with a separator that the names of modules may contain themselves."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from surgery.errors import SurgeryError

__all__ = ["decode", "encode"]


def encode(path: str, separator: str) -> str:
    """The path as it stands in a key."""
    return path if separator == "." else path.replace(".", separator)


@lru_cache(maxsize=1 << 16)
def decode(text: str, separator: str, words: frozenset[str]) -> str | None:
    """The path that a part of a key means, by the names that modules can have; None if a name is not known.

    Of several readings the one with the fewest names is taken. `SurgeryError` if there are two of these.
    """
    if separator == ".":
        return text
    readings = list(_readings(tuple(text.split(separator)), separator, words))
    if not readings:
        return None
    fewest = min(map(len, readings))
    first, *more = [reading for reading in readings if len(reading) == fewest]
    if more:
        raise SurgeryError(
            f"the name {text!r} has two meanings",
            why=f"it may be {'.'.join(first)} or {'.'.join(more[0])}",
            fix="give the base, whose modules have one of these names: base=",
        )
    return ".".join(first)


def _readings(parts: tuple[str, ...], separator: str, words: frozenset[str]) -> Iterator[tuple[str, ...]]:
    """The ways to read parts as names: numbers, and words that may contain the separator."""
    if not parts:
        yield ()
        return
    for end in range(1, min(len(parts), 8) + 1):
        name = separator.join(parts[:end])
        if end == 1 and name.isdecimal() or name in words:
            yield from ((name, *rest) for rest in _readings(parts[end:], separator, words))
