"""The report of loading an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.authoring.rule import Rule
from surgery.results import Report

__all__ = ["LoadReport"]


@dataclass
class LoadReport(Report):
    """The applied rules, and the keys that were `loaded`, `missing`, `unexpected` or misfits.

    `mismatched`: tensors of other sizes that `ignore_mismatched_sizes=True` passed over.

    `format`: the name of the files' format, such as "peft", "surgery", "kohya" or "mlx".

    `assumed`: facts that the files do not state and that were inferred, such as a scale or the paths of modules.

    The report is true if everything fitted. `load_adapter` requires that, except with `strict=False`.
    """

    adapter: str
    rules: list[Rule] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    base: list[str] = field(default_factory=list)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    assumed: list[str] = field(default_factory=list)
    format: str = ""

    def __bool__(self) -> bool:
        return not (self.missing or self.unexpected or self.misfits or self.mismatched or self.base)

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each tensor: adapter, tensor, status (loaded, missing, unexpected, misfit), reason."""
        keys = [(key, status, "") for status in ("loaded", "missing", "unexpected") for key in getattr(self, status)]
        keys += [
            (key, "misfit", why) for key, _, why in (line.partition(" ") for line in [*self.misfits, *self.mismatched])
        ]
        return [{"adapter": self.adapter, "tensor": key, "status": status, "reason": why} for key, status, why in keys]

    def __str__(self) -> str:
        lines = [f"adapter {self.adapter!r}: {len(self.loaded)} tensors loaded"]
        return "\n".join([*lines, *(f"  {text}" for text in [*self.problems(), *self.passed_over(), *self.assumed])])

    def passed_over(self) -> list[str]:
        """Returns one line for each kind of tensor that `ignore_mismatched_sizes` passed over."""
        return _grouped(self.mismatched)

    def problems(self) -> list[str]:
        """Returns one line for each kind of problem."""
        kinds = {"missing": self.missing, "not of this adapter": self.unexpected}
        lines = [f"{_counted(keys)} {kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys]
        return [*lines, *_grouped(self.misfits), *self.base]


def _grouped(misfits: Sequence[str], most: int = 5) -> list[str]:
    """Joins more than `most` lines with the same reason into one line with two examples."""
    by_reason: dict[str, list[str]] = {}
    for line in misfits:
        by_reason.setdefault(line.partition(" ")[2], []).append(line)
    problems = []
    for why, lines in by_reason.items():
        names = [line.partition(" ")[0] for line in lines[:2]]
        problems += (
            lines if len(lines) <= most else [f"{len(lines)} tensors, such as {' and '.join(names)}: each {why}"]
        )
    return problems


def _counted(keys: Sequence[str]) -> str:
    return "one tensor is" if len(keys) == 1 else f"{len(keys)} tensors are"


def _listed(keys: Sequence[str], most: int = 8) -> str:
    return ", ".join(key[:200] for key in keys[:most]) + (", …" if len(keys) > most else "")
