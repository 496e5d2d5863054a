"""Says of each problem of a load where it is, why it is one, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from surgery.errors import PlanError, SurgeryError
from surgery.storage.load_report import LoadReport
from surgery.storage.stored_adapter import Stored

__all__ = ["completed", "mismatch_errors"]

CORRECT = "correct the file's settings, or save the adapter again"


def mismatch_errors(report: LoadReport, source: Any, verb: str, same_base: bool) -> Iterator[SurgeryError]:
    """Yields an error for each line of a report: tensors that do not fit, and another base.

    `verb`: the function that the fix names. `same_base`: its argument.
    """
    where = _place(source)
    for text in report.problems():
        if text in report.base:
            if same_base:
                what, _, why = text.partition(": ")
                first = ", with the same structural rules applied first" if " layers here and had " in why else ""
                fix = f"load it on the base that it was trained on{first}; "
                fix += f"{verb}(…, same_base=False) makes this a warning"
                yield SurgeryError(what, where=where, why=why, fix=fix)
        elif text.endswith("holds NaN or infinity"):
            why = "the training diverged, or the file was damaged"
            fix = f"take an earlier checkpoint; {verb}(…, finite=False) takes such numbers"
            yield SurgeryError(text, where=where, why=why, fix=fix)
        else:
            why = "the file was made for another model, for other rules, or by a library that names tensors otherwise"
            fix = f"use the model that it was made for; {verb}(…, strict=False) takes what fits, and lists the rest"
            yield SurgeryError(text, where=where, why=why, fix=fix)


def completed(errors: Iterable[SurgeryError], source: Any, fix: str = CORRECT) -> list[SurgeryError]:
    """The errors, each with a place and a fix: those that it has, or the file and this fix."""
    listed = list(errors)
    for error in listed:
        if not isinstance(error, PlanError):
            error.where, error.fix = error.where or _place(source), error.fix or fix
    return listed


def _place(source: Any) -> str | None:
    if isinstance(source, Stored):
        return None
    return str(source) if isinstance(source, (str, Path)) else None
