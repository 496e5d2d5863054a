"""What a rule's own code calls its values: its `rewrite` is recorded once more, and its local variables are read."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

from torch import nn

from surgery.errors import SurgeryError
from surgery.forward.own_forward import OwnForward
from surgery.forward.tape import Layer, Tape, for_both_modes
from surgery.forward.values import Value
from surgery.state.records import Applied
from surgery.transaction.user_frames import is_ours, is_torchs
from surgery.weaving.rewrite_recording import SkippedSite, record_rewrite

__all__ = ["VariableName", "variable_names"]


_CAST: Any = getattr(cast, "__code__", None)  # its variable `val` is not a name of the rule's code


class VariableName(NamedTuple):
    """A name for a value. `assigned`: the code has a line that gives the value this name, so it is not a parameter."""

    text: str
    assigned: bool


def variable_names(
    live: Sequence[Applied], layers: Sequence[Layer], module: nn.Module, path: str, own: OwnForward
) -> dict[tuple[int, int], VariableName]:
    """The names by (layer, step of its tape), with layers counted from 1; without those of rules that now do otherwise.

    Rules may go by what has changed since they were applied. Then their values have no names here, and nothing else
    is lost.
    """
    found: dict[tuple[int, int], VariableName] = {}
    for number, (applied, layer) in enumerate(zip(live, layers, strict=True), start=1):
        with _watched() as seen:
            try:
                record_rewrite(applied.rule, module, path, applied.adapter, own, facts=applied.facts)
            except (SurgeryError, SkippedSite):
                continue
        for tape, offsets in _tapes_like(layer.tape, [tape for tape, _ in seen.values()], module.training):
            names = seen[id(tape)][1]
            found |= {(number, step + offsets): name for step, name in names.items()}
    return found


def _tapes_like(tape: Tape, seen: Sequence[Tape], training: bool) -> Iterator[tuple[Tape, int]]:
    """Those of the tapes that this one was made from, with how far their steps were moved."""
    for one in seen:
        if tuple(one.steps) == tuple(tape.steps):
            yield one, 0
            return
    if tape.by_mode and len(seen) == 2:
        evaluation, other = reversed(seen) if training else seen
        if tuple(for_both_modes(evaluation, other).steps) == tuple(tape.steps):
            yield from ((evaluation, 0), (other, len(evaluation.steps)))


@contextmanager
def _watched() -> Iterator[dict[int, tuple[Tape, dict[int, VariableName]]]]:
    """The local variables of users' functions that return meanwhile: by tape, the name of each step's value."""
    seen: dict[int, tuple[Tape, dict[int, VariableName]]] = {}

    def watch(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "return" or code is _CAST or is_ours(code.co_filename) or is_torchs(code.co_filename):
            return
        given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        for name, value in frame.f_locals.items():
            if issubclass(type(value), Value) and value._ref.kind == "op" and name.strip("_"):
                names = seen.setdefault(id(value._tape), (value._tape, {}))[1]
                assigned = name not in given and not code.co_name.startswith("<")
                known = names.get(value._ref.key)
                if known is None or assigned or not known.assigned:  # functions that are called return before theirs
                    names[value._ref.key] = VariableName(name, assigned)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield seen
    finally:
        sys.setprofile(before)
