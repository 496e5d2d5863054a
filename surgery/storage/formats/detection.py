"""Finds the format of a file by its keys. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from surgery.errors import SurgeryError
from surgery.storage.formats import rows as _rows  # registers the formats
from surgery.storage.formats.split import split_keys
from surgery.storage.formats.table import AdapterFormat, formats

__all__ = ["format_of_keys", "likely_format"]

_ROWS = _rows


def format_of_keys(keys: Collection[str], containers: Iterable[str] = ("safetensors",)) -> AdapterFormat | None:
    """The format to which all keys belong; None if there is no such format.

    `SurgeryError` if several formats have all these keys and mean different things by them.
    """
    if not keys:
        return None
    among = [each for each in formats().values() if each.container in containers]
    fitting = [each for each in among if not split_keys(each, keys)[1]]
    names = {each.name for each in fitting}
    fitting = [each for each in fitting if not names & set(each.contains)]
    if len(fitting) > 1:
        known = " or ".join(repr(each.name) for each in fitting)
        raise SurgeryError(
            f"the file may have the format {known}",
            where=next(iter(keys))[:200],
            why="its keys are those of each of them",
            fix=f"format={fitting[0].name!r}, or another of these",
        )
    return fitting[0] if fitting else None


def likely_format(keys: Collection[str], containers: Iterable[str] = ("safetensors",)) -> AdapterFormat | None:
    """The format to which most of the keys belong, where none has all of them; None if that is less than half."""
    among = [each for each in formats().values() if each.container in containers]
    left = {each.name: len(split_keys(each, keys)[1]) for each in among}
    best = min(left, key=lambda name: left[name], default=None)
    return formats()[best] if best is not None and 2 * left[best] < len(keys) else None
