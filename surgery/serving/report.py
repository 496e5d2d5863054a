"""The result of a check: what a program takes of an adapter, how, and what it does not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from surgery.errors import abbreviate
from surgery.results import Displayed, Report, Table

__all__ = ["TargetReport", "TargetSite"]

_SHOWN = 12  # rows of a printed table


@dataclass(frozen=True)
class TargetSite(Report):
    """One module that the adapter changes, and what the program makes of it.

    Attributes:
        path: the module's path.
        state: "taken" as it is, "lowered" to something that the program takes, or "refused".
        how: what is done, or why it is refused.
        rank: the rank in the file; 0 if there is none.
        error: the share of the change ‖ΔW‖ that lowering loses; 0.0 if nothing.
    """

    path: str
    state: Literal["taken", "lowered", "refused"]
    how: str = ""
    rank: int = 0
    error: float = 0.0


@dataclass(frozen=True)
class TargetReport(Displayed, Report):
    """The result of `check_target`. It is true in a condition if the program takes the adapter.

    Attributes:
        target: the name of the program.
        title: the program and its version.
        format: the format of the files.
        taken: whether `save_adapter(target=…)` writes the adapter.
        sites: a `TargetSite` for each module that the adapter changes.
        problems: why the program does not take it, in words.
        remedies: what can be done then.
        others: programs that take the adapter as it is here.
        notes: what a person should know.
        outputs: the relative difference of the outputs on each example, as a share of what the adapter changes there.
            Empty without examples, or if nothing is lost.
        command: how the program is started with the adapter.
    """

    target: str
    title: str
    format: str
    taken: bool
    sites: tuple[TargetSite, ...] = ()
    problems: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    outputs: tuple[float, ...] = field(default=())
    command: str = ""

    def __bool__(self) -> bool:
        return self.taken

    @property
    def error(self) -> float:
        """The largest share of a module's change that is lost."""
        return max((site.error for site in self.sites), default=0.0)

    def to_rows(self) -> list[dict[str, Any]]:
        """One row for each module."""
        return [site.to_dict() for site in self.sites]

    def summary(self) -> str:
        """One line: what is done, or the first problem."""
        if not self.taken:
            return "; ".join(dict.fromkeys(map(_reason, self.problems)))
        lowered = sum(site.state == "lowered" for site in self.sites)
        text = f"{lowered:,} of {len(self.sites):,} modules are lowered" if lowered else "as it is"
        return f"{text}, {self.error:.2%} is lost" if self.error >= 1e-4 else text

    __repr__ = Displayed.__str__  # instead of the dataclass's

    def _display_parts(self) -> list[str | Table]:
        parts: list[str | Table] = [f"{self.title} {'takes' if self.taken else 'does not take'} the adapter"]
        groups: dict[tuple[str, str], list[TargetSite]] = {}
        for site in self.sites:
            groups.setdefault((site.state, site.how), []).append(site)
        rows = [[state, _count(sites), how, _lost(sites)] for (state, how), sites in groups.items()]
        if rows:
            parts.append(Table(("", "modules", "how", "lost"), rows[:_SHOWN]))
        if len(rows) > _SHOWN:
            parts.append(f"and {len(rows) - _SHOWN:,} more rows: to_rows() has all")
        parts += [f"problem: {text}" for text in self.problems]
        parts += [f"remedy: {text}" for text in self.remedies]
        if self.others:
            parts.append(f"these take it: {', '.join(self.others)}")
        parts += [f"note: {text}" for text in self.notes]
        if self.outputs:
            parts.append("of the outputs' change, the examples lose " + ", ".join(f"{e:.2%}" for e in self.outputs))
        if self.taken and self.command:
            parts.append(f"start: {self.command}")
        return parts


def _reason(problem: str) -> str:
    """The reason of a problem that is printed in several lines."""
    hit = re.search(r"^ +why: +(.*)$", problem, re.MULTILINE)
    return hit[1] if hit else problem.partition("\n")[0]


def _count(sites: Sequence[TargetSite]) -> str:
    if len(sites) == 1:
        return sites[0].path
    patterns = dict.fromkeys(re.sub(r"\b\d+\b", "*", site.path) for site in sites)
    return f"{len(sites):,}: {abbreviate(patterns, 'patterns')}"


def _lost(sites: Sequence[TargetSite]) -> str:
    worst = max(site.error for site in sites)
    return "" if not worst else f"{worst:.2%}" if worst >= 1e-4 else f"{worst:.1e}"
