"""Finds the module here for a module of another program, and back, by the rows of a `ModuleNames`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from surgery.errors import SurgeryError
from surgery.storage.formats.table import ModuleNames, NameRow

__all__ = ["NameMap", "Place", "names_for_header", "names_named", "names_of_file", "register_module_names"]


WRAPPER = "language_model"  # the segment before a text model in models of text and images


class Place(NamedTuple):
    """A module's row, and the names in it; `index`: which of the row's modules it is."""

    row: NameRow
    theirs: str
    ours: tuple[str, ...]
    index: int = 0


class NameMap:
    """The rows of a `ModuleNames`, in both directions."""

    def __init__(self, names: ModuleNames):
        self.names = names

    @cached_property
    def _rows(self) -> list[tuple[NameRow, re.Pattern[str], list[re.Pattern[str]]]]:
        return [(row, _pattern(row.theirs), [_pattern(ours) for ours in row.ours]) for row in self.names.rows]

    def ours(self, theirs: str) -> Place | None:
        for row, pattern, _ in self._rows:
            if hit := pattern.fullmatch(theirs):
                return Place(row, theirs, tuple(_filled(ours, hit) for ours in row.ours))
        return Place(NameRow(theirs, (theirs,)), theirs, (theirs,)) if self.names.partial else None

    def theirs(self, ours: str) -> Place | None:
        for row, _, patterns in self._rows:
            for index, pattern in enumerate(patterns):
                if hit := pattern.fullmatch(ours):
                    return Place(row, _filled(row.theirs, hit), tuple(_filled(o, hit) for o in row.ours), index)
        inner = [name for name in ours.split(".") if name != WRAPPER]
        if self is not IDENTITY and WRAPPER in ours.split(".") and (place := self.theirs(".".join(inner))) is not None:
            return place  # the text model of a larger one; its files name it as if it stood alone
        return Place(NameRow(ours, (ours,)), ours, (ours,)) if self.names.partial else None

    def covers(self, paths: Iterable[str]) -> bool:
        return all(self.theirs(path) is not None for path in paths)

    def marked(self, theirs: Iterable[str]) -> bool:
        return any(re.match(mark, path) for mark in self.names.marks for path in theirs)

    def own_marked(self, paths: Iterable[str]) -> bool:
        return any(re.search(mark, path) for mark in self.names.own_marks for path in paths)


def _pattern(text: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\})", text)
    places = {"{rest}": r"(?P<rest>.+)"}
    made = [places.get(part, rf"(?P<{part[1:-1]}>\d+)") if part.startswith("{") else re.escape(part) for part in parts]
    return re.compile("".join(made))


def _filled(text: str, hit: re.Match[str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda place: hit[place[1]], text)


_names: dict[str, NameMap] = {}


def register_module_names(names: ModuleNames) -> ModuleNames:
    """Adds the module names of an architecture, for formats that refer to them."""
    _names[names.name] = NameMap(names)
    return names


def names_named(name: str) -> NameMap:
    if name not in _names:
        raise SurgeryError(f"there are no module names {name!r}", fix=f"one of {', '.join(_names)}")
    return _names[name]


IDENTITY = NameMap(ModuleNames("as-here", (), (), (), partial=True))
_names["as-here"] = IDENTITY


ARCHITECTURE = "general.architecture"  # the field of a header


def names_for_header(candidates: Iterable[str], header: Mapping[str, Any]) -> list[str]:
    """The candidates that a file's header allows: those of its architecture, where it names one."""
    names = list(candidates)
    if ARCHITECTURE not in header:
        return names
    fitting = [name for name in names if header[ARCHITECTURE] in names_named(name).names.header_names]
    if not fitting:
        known = sorted({each for name in names for each in names_named(name).names.header_names})
        raise SurgeryError(
            f"the architecture {str(header[ARCHITECTURE])[:40]!r} is not known here",
            why=f"names of modules are known for {', '.join(known)}",
            fix="register_module_names adds the names of another one",
        )
    return fitting


def names_of_file(theirs: Iterable[str], candidates: Iterable[str]) -> NameMap:
    """The names that a file's modules have, by their marks; those of this library if no mark occurs."""
    theirs = list(theirs)
    marked = [names_named(name) for name in candidates if names_named(name).marked(theirs)]
    if len(marked) > 1:
        kinds: Mapping[str, str] = {
            each.names.name: next(path for path in theirs if each.marked([path])) for each in marked
        }
        raise SurgeryError(
            "the file names modules as several programs do",
            why=", ".join(f"{path} as {name}" for name, path in kinds.items()),
            fix="convert the parts by themselves",
        )
    return marked[0] if marked else IDENTITY
