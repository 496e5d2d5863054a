"""Terms: the values of a forward to be, each an fx node before it is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgery.forward.context_regions import Inside
from surgery.forward.graph_functions import same_dtype
from surgery.forward.side_effects import draws, is_foreign, writes
from surgery.forward.tape_steps import Step
from surgery.tracing.decisions import check_decision, decide

__all__ = ["Term", "acts", "behind", "mapped", "node_of", "sources_of", "swapped", "terms_in", "value_operands"]


@dataclass(eq=False)
class Term:
    """One value of the forward to be: an fx node before it is written."""

    op: str
    target: Any
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    origin: str = ""
    node: fx.Node | None = None
    open: bool = False
    around: bool = False  # a call of `called_around`
    place: tuple[int, int, int] = (0, 0, 0)  # the forward's operation; before it, at it or after it; the order
    step: tuple[int, int] | None = None  # the tape (0: the forward's own, 1: the first layer's) and its step

    @property
    def writes(self) -> bool:
        if isinstance(self.target, Inside):
            op = "call_method" if isinstance(self.target.function, str) else "call_function"
            return writes(op, self.target.function, self.args, self.kwargs)
        return writes(self.op, self.target, self.args, self.kwargs)


def node_of(step: Step, args: Any) -> tuple[str, Any, Any]:
    if step.kind == "attribute":
        return "call_function", getattr, (*args, step.target)
    kinds = {"function": "call_function", "method": "call_method", "module": "call_module"}
    return kinds[step.kind], step.target, args


def acts(term: Term) -> bool:
    """Whether a line of a rewrite, besides one that writes in place, runs though nobody uses its result."""
    if isinstance(term.target, Inside):
        op = "call_method" if isinstance(term.target.function, str) else "call_function"
        return acts(Term(op, term.target.function, term.args, term.kwargs))
    known = term.target in (decide, check_decision)
    return known or draws(term.op, term.target, term.args, term.kwargs) or is_foreign(term.op, term.target)


def value_operands(term: Term) -> Any:
    """The operands of a term without those of which it reads the shape or dtype alone."""
    if term.target is same_dtype:
        return term.args[0]
    shape_alone = term.target in _LIKE or term.target is getattr and term.args[1] in ("shape", "dtype", "device")
    return term.args[1:] if shape_alone or term.op == "call_method" and term.target in _LIKE_METHODS else term.args


_LIKE = (torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like)


_LIKE_METHODS = ("size", "dim", "numel", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")


def behind(term: Any) -> Any:
    """The term that a reading of it stands for."""
    while isinstance(term, Term) and term.op == "read":
        term = term.args[0]
    return term


def sources_of(value: Any) -> list[Term]:
    """All terms that a value is computed from."""
    found: dict[int, Term] = {}
    waiting = terms_in(value)
    while waiting:
        term = waiting.pop()
        if id(term) not in found:
            found[id(term)] = term
            waiting += terms_in((term.args, term.kwargs))
    return list(found.values())


def mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Term):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(item, change) for item in value)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(mapped(item, change) for item in (value.start, value.stop, value.step)))
    return value


def swapped(value: Any, old: Term, new: Any) -> Any:
    return mapped(value, lambda term: new if term is old else term)


def terms_in(value: Any) -> list[Term]:
    found: list[Term] = []
    mapped(value, lambda term: found.append(term))
    return found
