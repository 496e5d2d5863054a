"""Where the lines of a rewrite stand in the forward."""

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
    """Where the lines of a tape stand in the forward: (which operation, before or after it)."""

    def __init__(self, tape: Tape, nodes: Mapping[str, int]):
        self.tape, self.nodes = tape, nodes
        self.writes = tape.writes
        self.at: list[Place] = [START] * len(tape.steps)
        self.last = START
        self.until = self._deadlines() if nodes else {}

    def of(self, ref: Ref, term: Any) -> Place:
        if ref.read:
            return (self.nodes.get(ref.read, -1), -1)
        if ref.kind in ("output", "base"):
            return END
        if ref.kind == "op":
            return self.at[int(ref.key)]
        if ref.kind in ("param", "state", "training", "this", "rows") or not isinstance(term, Term):
            return START
        return (term.place[0], term.place[1] or 1)

    def step(self, index: int, operands: Iterable[tuple[Ref, Any]]) -> Place:
        """The place of a step. `operands`: the values that it names, and what stands for each."""
        step = self.tape.steps[index]
        place = max((self.of(ref, term) for ref, term in operands), default=START)
        if step.late and step.target is not check_decision and self.until.get(index, END) >= END:
            place = END
        if self.writes:
            place = max(place, self.last)
        self.at[index] = self.last = place
        return place

    def _deadlines(self) -> dict[int, Place]:
        """Before which operation a line has to be done, since what it computes takes the place of something inside."""
        until: dict[int, Place] = {}
        for index in range(len(self.tape.steps) - 1, -1, -1):
            step = self.tape.steps[index]
            limit = until.get(index, END)
            if step.kind == "replace" and step.args[0].kind in ("inside", "made"):
                limit = (self.nodes.get(str(step.args[0].key), -1), 1)
            for ref in (*refs_in(step.args), *refs_in(step.kwargs)):
                if ref.kind == "op":
                    until[int(ref.key)] = min(limit, until.get(int(ref.key), END))
        return until


Place = tuple[int, int]


START, END = (-1, 1), (sys.maxsize, 1)
