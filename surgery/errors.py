"""The `SurgeryError` family. Each error says what happened, where, why, and what to do."""

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
    """The base class of all errors of the engine. The model is unchanged when one is raised.

    >>> try:
    ...     raise SurgeryError("nothing matches 'qurey'", where="encoder", why="no such module", fix="use 'query'")
    ... except SurgeryError as error:
    ...     print(error)
    nothing matches 'qurey'
      where: encoder
      why:   no such module
      fix:   use 'query'

    Args:
        what: What happened, in one line.
        where: The path of the module, the file or the line. Default None: no place.
        why: The reason. Default None.
        fix: What the caller can do. Default None.
    """

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, fix: str | None = None):
        super().__init__(what)
        self.what, self.where, self.why, self.fix = what, where, why, fix

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  {label:<6} {text}" for label, text in self._details() if text]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self).partition(chr(10))[0]!r})"  # the first line

    def _details(self) -> list[tuple[str, str | None]]:
        return [("where:", self.where), ("why:", self.why), ("fix:", self.fix)]

    def __reduce__(self):
        # BaseException pickles only `args`, so keyword arguments would be lost.
        return _rebuild, (type(self), dict(self.__dict__))


class SurgeryWarning(UserWarning):
    """A warning about a result that is valid only for some calls of the model, or about work that was skipped."""


class MatchError(SurgeryError):
    """A target matches no module, too many modules, or is ambiguous."""


class RuleError(SurgeryError):
    """A rule has an invalid field, an unknown name or version, or its data can't be read."""


class TraceError(SurgeryError):
    """A forward can't be traced as a graph. `where` is the line in the user's code."""


class SiteError(SurgeryError):
    """A module can't be rewritten, or a rewrite uses something that the site does not have."""


class MergeError(SurgeryError):
    """A merge is not possible, or a base weight changed while it was merged."""


class NotInFilesError(MergeError):
    """An adapter can't be merged into the files of a base. `merge_to` may merge it into the loaded model."""


class ParityError(SurgeryError):
    """An exported file does not compute what the model computes.

    Attributes:
        report: The `ParityReport` with every comparison.
        elsewhere: Whether the outputs agree at the example's own sizes and differ only at other sizes.
    """

    report: Any = None
    elsewhere: bool = False


class PlanError(SurgeryError):
    """Collects every problem of a list of rules on a model, in one error.

    Attributes:
        problems: The problems, as a list of `SurgeryError`.
    """

    def __init__(self, problems: Iterable[SurgeryError]):
        self.problems = list(problems)
        count = len(self.problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''}, the model is untouched")

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        texts = group_problems(self.problems)
        if len(texts) == 1:
            return texts[0]
        parts = [f"{i}. {text}".replace("\n", "\n   ") for i, text in enumerate(texts, 1)]
        return "\n".join([self.what + ":", *parts])


class LoadError(PlanError):
    """Collects every problem that prevents loading an adapter's files into a model, in one error."""


def _rebuild(cls: type[SurgeryError], state: dict) -> SurgeryError:
    error = cls.__new__(cls, state["what"])
    error.__dict__.update(state)
    return error


def group_problems(problems: Sequence[SurgeryError]) -> list[str]:
    """Format problems as texts. A problem that repeats at many places becomes one text with the places.

    >>> problems = [SurgeryError("no bias", where=f"layers.{i}", why=f"layers.{i} has none") for i in range(9)]
    >>> print(*group_problems(problems))
    no bias
      where: 9 sites, such as layers.0, layers.1
      why:   layers.0 has none
    """
    groups: dict[tuple, list[SurgeryError]] = {}
    for problem in problems:
        groups.setdefault(_reason(problem), []).append(problem)
    texts = list[str]()
    for alike in groups.values():
        if len(alike) > 5 or (len(alike) > 1 and len({_details(problem) for problem in alike}) == 1):
            first = alike[0]
            where = abbreviate(dict.fromkeys(problem.where or "" for problem in alike)) or None
            texts.append(str(SurgeryError(first.what, where=where, why=first.why, fix=first.fix)))
        else:
            texts += map(str, alike)
    return texts


def collapse_similar(texts: Sequence[str]) -> list[str]:
    """Replace more than five texts that differ only in numbers, such as a layer's, by the first and a count."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(re.sub(r"\d+", "#", text), []).append(text)
    collapsed = list[str]()
    for alike in groups.values():
        many = len(alike) > 5
        collapsed += [f"{alike[0]} (and {len(alike) - 1:,} more that differ in numbers)"] if many else alike
    return collapsed


def _details(problem: SurgeryError) -> tuple[str, str, str]:
    """Returns what, why and fix, with the place's path replaced by `…`."""
    where = problem.where
    texts = (problem.what, problem.why or "", problem.fix or "")
    what, why, fix = (text.replace(where, "…") if where else text for text in texts)
    return what, why, fix


def _reason(problem: SurgeryError) -> tuple:
    """Returns a key that is equal for problems that differ only in their place and in numbers."""
    if isinstance(problem, PlanError) or not problem.where:
        return type(problem), str(problem)
    return type(problem), *(re.sub(r"\d+", "#", text) for text in _details(problem))


def abbreviate(things: Iterable[str], noun: str = "sites") -> str:
    """Join up to five names; of more names, give the count and two examples.

    >>> abbreviate(["a", "b", "c"]), abbreviate(map(str, range(210)))
    ('a, b, c', '210 sites, such as 0, 1')
    """
    things = list(things)
    few = len(things) <= 5
    return ", ".join(things) if few else f"{len(things):,} {noun}, such as {', '.join(things[:2])}"


def near_misses(word: str, options: Iterable[str], limit: int = 3) -> str | None:
    """Suggest similar options, as `"did you mean 'query'?"`; None if no option is similar."""
    pool = list(dict.fromkeys(options))
    close = difflib.get_close_matches(word, pool, n=limit, cutoff=0.6)
    if not close:
        close = [option for option in pool if word and (word in option or option in word)][:limit]
    return f"did you mean {' or '.join(repr(option) for option in close)}?" if close else None


def qualified_name(cls: type) -> str:
    """The name of a class with its module: `torch.nn.modules.linear.Linear`."""
    return f"{cls.__module__}.{cls.__qualname__}"
