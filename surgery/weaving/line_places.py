"""Computes the places of a rewrite's lines in the forward."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from surgery.forward.tape import Tape
from surgery.forward.tape_steps import Ref, refs_in
from surgery.tracing.decisions import check_decision
from surgery.weaving.terms import Term

__all__ = ["END", "LinePlaces", "Place", "START"]


class LinePlaces:
    """The places of a tape's lines in the forward: (number of the operation, -1 before, 0 at or 1 after it)."""

    def __init__(self, tape: Tape, nodes: Mapping[str, int]):
        self.tape, self.nodes = tape, nodes
        self.writes = tape.writes
        self.places: list[Place] = [START] * len(tape.steps)
        self.last_place = START
        self.deadlines = self._deadlines() if nodes else {}

    def place_of(self, ref: Ref, term: Any) -> Place:
        if ref.read:
            return (self.nodes.get(ref.read, -1), -1)
        if ref.kind in ("output", "base"):
            return END
        if ref.kind == "op":
            return self.places[int(ref.key)]
        if ref.kind in ("param", "state", "training", "this", "rows") or not isinstance(term, Term):
            return START
        return (term.place[0], term.place[1] or 1)

    def place_step(self, index: int, operands: Iterable[tuple[Ref, Any]]) -> Place:
        """Returns the place of a step. `operands`: the values that the step names, each with its term."""
        step = self.tape.steps[index]
        place = max((self.place_of(ref, term) for ref, term in operands), default=START)
        if step.late and step.target is not check_decision and self.deadlines.get(index, END) >= END:
            place = END
        if self.writes:
            place = max(place, self.last_place)
        self.places[index] = self.last_place = place
        return place

    def _deadlines(self) -> dict[int, Place]:
        """Returns the latest place of each line that computes the replacement of a value inside the forward."""
        deadlines: dict[int, Place] = {}
        for index in range(len(self.tape.steps) - 1, -1, -1):
            step = self.tape.steps[index]
            limit = deadlines.get(index, END)
            if step.kind == "replace" and step.args[0].kind in ("inside", "made"):
                limit = (self.nodes.get(str(step.args[0].key), -1), 1)
            for ref in (*refs_in(step.args), *refs_in(step.kwargs)):
                if ref.kind == "op":
                    deadlines[int(ref.key)] = min(limit, deadlines.get(int(ref.key), END))
        return deadlines


Place = tuple[int, int]
START, END = (-1, 1), (sys.maxsize, 1)
