"""The forward that is being woven: its terms, and the present term of each value."""

from __future__ import annotations

import operator
from typing import Any

from surgery.forward.own_forward import OwnForward
from surgery.forward.tape_steps import Ref
from surgery.forward.unnamed_inputs import FIRST, first_input, first_names, hidden_first, starred_of, with_first_input
from surgery.packed.dequantised_stack import dequantised_stack
from surgery.packed.packed_weight import dequantised_weight
from surgery.weaving.line_places import END, START, Place
from surgery.weaving.terms import Term

__all__ = ["CONSTANTS", "OUTPUT", "ROWS", "TermGraph"]

# Inputs before the forward's own inputs: the rows of each adapter, the own forward's output, the graph's constants.
ROWS, OUTPUT, CONSTANTS = "_surgery_rows", "_surgery_output", "_surgery_constants"


class TermGraph:
    """The terms of one forward in training or evaluation mode. The first terms are the inputs of the forward."""

    def __init__(self, own: OwnForward, training: bool):
        self.own = own
        self.training = training
        self.current: dict[Ref, Any] = {}  # the present term of each value, or a structure of terms
        self.terms: list[Term] = []
        self.effects: list[Term] = []  # terms that run even if nothing uses their result
        self.replacements: list[list[Term]] = []  # for each layer: the terms that replace others
        self.ordered: list[tuple[str, list[Term]]] = []  # lines of rewrites that write in place, in order
        self.places: dict[str, int] = {}  # node name → the number of the operation in the forward
        self.call: Term | None = None  # an opaque site's call of its base
        self.constants: dict[str, Any] = {}  # functions that rules wrap, by name
        self.outputs: list[Any] = []  # the own forward's output, and the output after each layer
        self._add_inputs()

    def _add_inputs(self) -> None:
        for name in self.own.signature.parameters:
            self.current[Ref("input", name)] = self.add_term("placeholder", name)
        if hidden_first(self.own.signature):
            arguments = (first_names(self.own.base), *self.starred_values())
            self.current[Ref("input", FIRST)] = self.add_term("call_function", first_input, arguments)

    def add_term(
        self, op: str, target: Any, args: Any = (), kwargs: Any = None, origin: str = "", place: Place | None = None
    ) -> Term:
        """Add a term. Without a place, inputs and attributes are placed at the beginning, other terms at the end."""
        term = Term(op, target, args, {} if kwargs is None else kwargs, origin)
        fixed = op in ("placeholder", "get_attr") or target is first_input
        term.place = (*(place or (START if fixed else END)), len(self.terms))
        self.terms.append(term)
        return term

    def read_state(self, seen: dict[Ref, Any], path: str) -> Any:
        """Returns the term of an attribute of the module. `seen`: the terms to look in and to add it to."""
        ref = Ref("state", path)
        if ref not in seen:
            if path in self.own.packed:
                itself = self.add_term("get_attr", "_surgery_self")
                reads: Any = (dequantised_weight, itself) if path == "weight" else (dequantised_stack, itself, path)
                term = self.add_term("call_function", reads[0], reads[1:], place=START)
            else:
                term = self.add_term("get_attr", path)
            seen[ref] = term
            self.current.setdefault(ref, term)
        return seen[ref]

    def leading_input(self, name: str) -> Term:
        """Returns the term of an input before the forward's own inputs."""
        ref = Ref("input", name)
        if ref not in self.current:
            self.current[ref] = self.add_term("placeholder", name)
        return self.current[ref]

    def add_constant(self, name: str) -> Term:
        """Add the lookup of one of the graph's constants."""
        return self.add_term("call_function", operator.getitem, (self.leading_input(CONSTANTS), name))

    def starred_values(self) -> tuple[Any, Any]:
        """Returns the present values of the forward's `*args` and `**kwargs`."""
        names = starred_of(self.own.signature)
        return (
            self.current[Ref("input", names["*"])] if "*" in names else (),
            self.current[Ref("input", names["**"])] if "**" in names else {},
        )

    def with_first(self, new: Any, origin: str) -> dict[str, Term]:
        """Returns the forward's `*args` and `**kwargs` with another first input, by their names."""
        values = (first_names(self.own.base), new, *self.starred_values())
        arguments = self.add_term("call_function", with_first_input, values, origin=origin)
        positions = {"*": 0, "**": 1}
        return {
            name: self.add_term("call_function", operator.getitem, (arguments, positions[star]), origin=origin)
            for star, name in starred_of(self.own.signature).items()
        }
