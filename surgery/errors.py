"""One family of errors. Each says what happened, where, why, and what to do about it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "LoadError",
    "MatchError",
    "MergeError",
    "ParityError",
    "PlanError",
    "RuleError",
    "SiteError",
    "SurgeryError",
    "SurgeryWarning",
    "TraceError",
]


class SurgeryError(Exception):
    """Anything the engine refuses to do; the model is as it was before the call.

    >>> try:
    ...     raise SurgeryError("nothing matches 'qurey'", where="encoder", why="no such module", fix="use 'query'")
    ... except SurgeryError as error:
    ...     print(error)
    nothing matches 'qurey'
      where: encoder
      why:   no such module
      fix:   use 'query'
    """

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, fix: str | None = None):
        super().__init__(what)
        self.what, self.where, self.why, self.fix = what, where, why, fix

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  {label:<6} {text}" for label, text in self._details() if text]
        return "\n".join(lines)

    def _details(self) -> list[tuple[str, str | None]]:
        return [("where:", self.where), ("why:", self.why), ("fix:", self.fix)]

    def __reduce__(self):
        # Keyword arguments do not survive BaseException's own pickling, which knows `args` alone.
        return _rebuild, (type(self), dict(self.__dict__))


class SurgeryWarning(UserWarning):
    """Something that holds for some calls of the model and not for all, with the place in the code that decides."""


class MatchError(SurgeryError):
    """A target that names nothing, too much, or something ambiguous."""


class RuleError(SurgeryError):
    """A rule with an impossible field, an unknown name or version, or data that can't be read as a rule."""


class TraceError(SurgeryError):
    """A forward that can't be held as a graph, with the place in the user's code."""


class SiteError(SurgeryError):
    """A module that can't be rewritten, or a rewrite that asks for what the site does not have."""


class MergeError(SurgeryError):
    """A merge that can't be done, or a base weight that changed while it was merged."""


class ParityError(SurgeryError):
    """An exported file that does not compute what the model does: `report` has every comparison.

    `elsewhere`: at the example's own sizes it does.
    """

    report: Any = None
    elsewhere: bool = False


class PlanError(SurgeryError):
    """Everything that is wrong with a list of rules on a model, at once: `problems` holds one error each."""

    def __init__(self, problems: Iterable[SurgeryError]):
        self.problems = list(problems)
        count = len(self.problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''}, the model is untouched")

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        told = grouped(self.problems)
        if len(told) == 1:
            return told[0]
        parts = [f"{i}. {problem}".replace("\n", "\n   ") for i, problem in enumerate(told, 1)]
        return "\n".join([self.what + ":", *parts])


class LoadError(PlanError):
    """Everything that keeps an adapter's files from being loaded into a model, at once."""


def _rebuild(cls: type[SurgeryError], state: dict) -> SurgeryError:
    error = cls.__new__(cls, state["what"])
    error.__dict__.update(state)
    return error


def grouped(problems: Sequence[SurgeryError]) -> list[str]:
    """Problems as texts. What is the same at many places is told once, with the places.

    >>> print(*grouped([SurgeryError("no bias", where=f"layers.{i}", why=f"layers.{i} has none") for i in range(9)]))
    no bias
      where: 9 sites, such as layers.0, layers.1
      why:   layers.0 has none
    """
    groups: dict[tuple, list[SurgeryError]] = {}
    for problem in problems:
        groups.setdefault(_reason(problem), []).append(problem)
    told = list[str]()
    for alike in groups.values():
        if len(alike) > 5 or (len(alike) > 1 and len({_details(problem) for problem in alike}) == 1):
            first = alike[0]
            where = listed(dict.fromkeys(problem.where or "" for problem in alike)) or None
            told.append(str(SurgeryError(first.what, where=where, why=first.why, fix=first.fix)))
        else:
            told += map(str, alike)
    return told


def told_once(texts: Sequence[str]) -> list[str]:
    """Texts that differ in numbers alone, such as a layer's, as one: the first, with how many there are."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(re.sub(r"\d+", "#", text), []).append(text)
    found = list[str]()
    for alike in groups.values():
        many = len(alike) > 5
        found += [f"{alike[0]} (and {len(alike) - 1:,} more that differ in numbers)"] if many else alike
    return found


def _details(problem: SurgeryError) -> tuple[str, str, str]:
    """What happened, why, and what to do, without the place."""
    where = problem.where
    texts = (problem.what, problem.why or "", problem.fix or "")
    what, why, fix = (text.replace(where, "…") if where else text for text in texts)
    return what, why, fix


def _reason(problem: SurgeryError) -> tuple:
    """Equal for problems that are the same at other places: their texts, where there is a place without numbers."""
    if isinstance(problem, PlanError) or not problem.where:
        return type(problem), str(problem)
    return type(problem), *(re.sub(r"\d+", "#", text) for text in _details(problem))


def listed(things: Iterable[str], noun: str = "sites") -> str:
    """Up to five as they are; of more, how many there are and two of them.

    >>> listed(["a", "b", "c"]), listed(map(str, range(210)))
    ('a, b, c', '210 sites, such as 0, 1')
    """
    things = list(things)
    few = len(things) <= 5
    return ", ".join(things) if few else f"{len(things):,} {noun}, such as {', '.join(things[:2])}"


def near_misses(word: str, options: Iterable[str], limit: int = 3) -> str | None:
    """`"did you mean 'query'?"`, or None where nothing is near."""
    pool = list(dict.fromkeys(options))
    found = difflib.get_close_matches(word, pool, n=limit, cutoff=0.6)
    if not found:
        found = [option for option in pool if word and (word in option or option in word)][:limit]
    return f"did you mean {' or '.join(repr(option) for option in found)}?" if found else None
