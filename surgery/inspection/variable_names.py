"""Finds the variable names of a rule's own code: it records `rewrite` again and reads the local variables."""

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
    """A name for a value. `assigned`: a line of the code assigns the name, so it is not a parameter."""

    text: str
    assigned: bool


def variable_names(
    live: Sequence[Applied],
    layers: Sequence[Layer],
    module: nn.Module,
    path: str,
    own: OwnForward,
    training: bool | None = None,
) -> dict[tuple[int, int], VariableName]:
    """The names by (layer, step of its tape), with layers counted from 1.

    A rule may now record other steps than when it was applied, because its result depends on something that has
    changed. Then its values have no names in the result. `training`: the mode of the graph in `own`.
    """
    mode = module.training if training is None else training
    names_by_step: dict[tuple[int, int], VariableName] = {}
    for number, (applied, layer) in enumerate(zip(live, layers, strict=True), start=1):
        with _watch_variables() as recordings:
            try:
                record_rewrite(applied.rule, module, path, applied.adapter, own, facts=applied.facts, training=mode)
            except (SurgeryError, SkippedSite):
                continue
        for tape, offsets in _tapes_like(layer.tape, [tape for tape, _ in recordings.values()], mode):
            names = recordings[id(tape)][1]
            names_by_step |= {(number, step + offsets): name for step, name in names.items()}
    return names_by_step


def _tapes_like(tape: Tape, recorded_tapes: Sequence[Tape], training: bool) -> Iterator[tuple[Tape, int]]:
    """The recorded tapes that equal a tape or its part for one mode, each with the index of its first step."""
    for recorded_tape in recorded_tapes:
        if tuple(recorded_tape.steps) == tuple(tape.steps):
            yield recorded_tape, 0
            return
    if tape.by_mode and len(recorded_tapes) == 2:
        evaluation, other_mode = reversed(recorded_tapes) if training else recorded_tapes
        if tuple(for_both_modes(evaluation, other_mode).steps) == tuple(tape.steps):
            yield from ((evaluation, 0), (other_mode, len(evaluation.steps)))


@contextmanager
def _watch_variables() -> Iterator[dict[int, tuple[Tape, dict[int, VariableName]]]]:
    """Read the local variables of users' functions that return inside the block: by tape, the names of values."""
    recordings: dict[int, tuple[Tape, dict[int, VariableName]]] = {}

    def watch(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "return" or code is _CAST or is_ours(code.co_filename) or is_torchs(code.co_filename):
            return
        parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        for name, value in frame.f_locals.items():
            if issubclass(type(value), Value) and value._ref.kind == "op" and name.strip("_"):
                names = recordings.setdefault(id(value._tape), (value._tape, {}))[1]
                assigned = name not in parameters and not code.co_name.startswith("<")
                earlier = names.get(value._ref.key)
                # An inner function returns before its caller, so the caller's names win.
                if earlier is None or assigned or not earlier.assigned:
                    names[value._ref.key] = VariableName(name, assigned)

    before = sys.getprofile()
    try:
        sys.setprofile(watch)
        yield recordings
    finally:
        sys.setprofile(before)
