"""The forward that is being woven: its terms, and which of them stands for each value at present."""

from __future__ import annotations

import operator
from typing import Any

from surgery.forward.own_forward import OwnForward
from surgery.forward.tape_steps import Ref
from surgery.forward.unnamed_inputs import FIRST, first_input, first_names, hidden_first, starred_of, with_first_input
from surgery.weaving.line_places import END, START, Place
from surgery.weaving.terms import Term

__all__ = ["KEPT", "OUTPUT", "ROWS", "TermGraph"]

# Inputs that come before a forward's own: what tells which rows are whose, the output, functions and objects it keeps.
ROWS, OUTPUT, KEPT = "_surgery_rows", "_surgery_output", "_surgery_kept"


class TermGraph:
    """The terms of one forward in training or evaluation mode; it begins with the inputs of the forward."""

    def __init__(self, own: OwnForward, training: bool):
        self.own = own
        self.training = training
        self.now: dict[Ref, Any] = {}  # what stands for a value at present: a term, or a structure of terms
        self.terms: list[Term] = []
        self.effects: list[Term] = []  # terms that run for what they do, whether or not their result is used
        self.replacements: list[list[Term]] = []  # for each layer: the terms that it puts in the place of others
        self.ordered: list[tuple[str, list[Term]]] = []  # lines of rewrites that write in place, in their order
        self.places: dict[str, int] = {}  # which operation of the forward a node is
        self.call: Term | None = None  # an opaque site's call of its base
        self.kept: dict[str, Any] = {}  # functions that rules put others around
        self.outputs: list[Any] = []  # the own forward's output, and the one that each layer makes of it
        self._add_inputs()

    def _add_inputs(self) -> None:
        for name in self.own.signature.parameters:
            self.now[Ref("input", name)] = self.term("placeholder", name)
        if hidden_first(self.own.signature):
            given = (first_names(self.own.base), *self.starred())
            self.now[Ref("input", FIRST)] = self.term("call_function", first_input, given)

    def term(
        self, op: str, target: Any, args: Any = (), kwargs: Any = None, origin: str = "", place: Place | None = None
    ) -> Term:
        term = Term(op, target, args, {} if kwargs is None else kwargs, origin)
        there = op in ("placeholder", "get_attr") or target is first_input
        term.place = (*(place or (START if there else END)), len(self.terms))
        self.terms.append(term)
        return term

    def state(self, seen: dict[Ref, Any], path: str) -> Any:
        ref = Ref("state", path)
        if ref not in seen:
            found = self.term("get_attr", path)
            seen[ref] = found
            self.now.setdefault(ref, found)
        return seen[ref]

    def before(self, name: str) -> Term:
        """An input that comes before the forward's own."""
        ref = Ref("input", name)
        if ref not in self.now:
            self.now[ref] = self.term("placeholder", name)
        return self.now[ref]

    def kept_function(self, name: str) -> Term:
        return self.term("call_function", operator.getitem, (self.before(KEPT), name))

    def starred(self) -> tuple[Any, Any]:
        """What the forward's `*args` and `**kwargs` are at present."""
        names = starred_of(self.own.signature)
        return (
            self.now[Ref("input", names["*"])] if "*" in names else (),
            self.now[Ref("input", names["**"])] if "**" in names else {},
        )

    def with_first(self, new: Any, origin: str) -> dict[str, Term]:
        """The forward's `*args` and `**kwargs` with another first input, by their names."""
        values = (first_names(self.own.base), new, *self.starred())
        given = self.term("call_function", with_first_input, values, origin=origin)
        at = {"*": 0, "**": 1}
        return {
            name: self.term("call_function", operator.getitem, (given, at[star]), origin=origin)
            for star, name in starred_of(self.own.signature).items()
        }
