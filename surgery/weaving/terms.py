"""Terms: the values of the forward that is being woven. Each term becomes one fx node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgery.forward.context_regions import Inside
from surgery.forward.graph_functions import same_dtype
from surgery.forward.side_effects import draws, is_foreign, writes
from surgery.forward.tape_steps import Step
from surgery.tracing.decisions import check_decision, decide

__all__ = [
    "Term",
    "must_run",
    "skip_reads",
    "map_terms",
    "node_parts",
    "sources_of",
    "substitute",
    "terms_in",
    "value_operands",
]


@dataclass(eq=False)
class Term:
    """One value of the forward that is being woven. `node` is its fx node once it is written."""

    op: str
    target: Any
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    origin: str = ""
    node: fx.Node | None = None
    in_progress: bool = False
    is_wrapped: bool = False  # a call of `call_wrapped`
    place: tuple[int, int, int] = (
        0,
        0,
        0,
    )  # the number of the operation; before (-1), at (0) or after (1) it; the order
    step: tuple[int, int] | None = None  # the tape (0: the own forward's, 1: the first layer's) and its step

    @property
    def writes(self) -> bool:
        if isinstance(self.target, Inside):
            op = "call_method" if isinstance(self.target.function, str) else "call_function"
            return writes(op, self.target.function, self.args, self.kwargs)
        return writes(self.op, self.target, self.args, self.kwargs)


def node_parts(step: Step, args: Any) -> tuple[str, Any, Any]:
    """Returns the op, target and arguments of the fx node for a step."""
    if step.kind == "attribute":
        return "call_function", getattr, (*args, step.target)
    kinds = {"function": "call_function", "method": "call_method", "module": "call_module"}
    return kinds[step.kind], step.target, args


def must_run(term: Term) -> bool:
    """Whether a line of a rewrite must run even if nothing uses its result. In-place writes are checked separately."""
    if isinstance(term.target, Inside):
        op = "call_method" if isinstance(term.target.function, str) else "call_function"
        return must_run(Term(op, term.target.function, term.args, term.kwargs))
    decides = term.target in (decide, check_decision)
    return decides or draws(term.op, term.target, term.args, term.kwargs) or is_foreign(term.op, term.target)


def value_operands(term: Term) -> Any:
    """Returns the operands of a term whose values it uses, without those whose shape or dtype alone it uses."""
    if term.target is same_dtype:
        return term.args[0]
    shape_alone = term.target in _LIKE or term.target is getattr and term.args[1] in ("shape", "dtype", "device")
    return term.args[1:] if shape_alone or term.op == "call_method" and term.target in _LIKE_METHODS else term.args


_LIKE = (torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like)
_LIKE_METHODS = ("size", "dim", "numel", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")


def skip_reads(term: Any) -> Any:
    """Returns the term behind "read" terms. Other values are returned as they are."""
    while isinstance(term, Term) and term.op == "read":
        term = term.args[0]
    return term


def sources_of(value: Any) -> list[Term]:
    """Returns all terms that a value is computed from."""
    sources: dict[int, Term] = {}
    waiting = terms_in(value)
    while waiting:
        term = waiting.pop()
        if id(term) not in sources:
            sources[id(term)] = term
            waiting += terms_in((term.args, term.kwargs))
    return list(sources.values())


def map_terms(value: Any, change: Callable[[Term], Any]) -> Any:
    """Returns a value with each term in it replaced by `change(term)`."""
    if isinstance(value, Term):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(map_terms(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_terms(item, change) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(map_terms(item, change) for item in (value.start, value.stop, value.step)))
    return value


def substitute(value: Any, old: Term, new: Any) -> Any:
    return map_terms(value, lambda term: new if term is old else term)


def terms_in(value: Any) -> list[Term]:
    terms: list[Term] = []
    map_terms(value, lambda term: terms.append(term))
    return terms
