"""Lists the attributes through which a class's forward may reach other modules, from its source alone."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import FunctionType
from typing import Any

from torch import nn

from surgery.planning.attribute_chains import CALL, WRAP, Chain
from surgery.planning.source_facts import Facts
from surgery.planning.source_reads import facts_of

__all__ = ["MODULE_METHODS", "inherited", "leads_of", "lookup"]


def lookup(mro: Iterable[type], name: str) -> Any:
    """The class attribute of this name, or None."""
    return next((vars(cls)[name] for cls in mro if name in vars(cls)), None)


def inherited(cls: type, after: type, name: str) -> Any:
    """The class attribute that `super()` in the class `after` finds."""
    return lookup(cls.__mro__[cls.__mro__.index(after) + 1 :] if after in cls.__mro__ else (), name)


_cached_leads: weakref.WeakKeyDictionary[type, set[str]] = weakref.WeakKeyDictionary()


def leads_of(cls: type[nn.Module]) -> set[str]:
    """The attributes through which a class's forward may reach another module's parameters; `*`: any attribute."""
    leads = _cached_leads.get(cls)
    if leads is None:
        leads = _cached_leads[cls] = _LeadSearch(cls).names
    return leads


class _LeadSearch:
    """An upper bound of what `ReadSearch` reaches from modules of a class, without a module."""

    def __init__(self, cls: type[nn.Module]):
        self.cls, self.names = cls, set[str]()
        self.todo: list[tuple[Facts, str]] = []
        self.follow(lookup(cls.__mro__, "forward"))
        for facts, root in self.todo:  # `follow` appends to the list during the loop
            for chain in (*facts.returns, *(chain for chain, _ in facts.uses)):
                self.lead(chain, root)
            for callee, arguments, _ in facts.calls:
                self.lead(callee, root)
                for chain in (chain for _, chain in arguments if chain[0] == root):
                    if chain[1]:
                        self.lead(chain, root, is_argument=True)
                    elif isinstance(callee[0], FunctionType):
                        self.follow(callee[0], *facts_of(callee[0]).parameters)
                    else:
                        self.names.add("*")

    def follow(self, function: Any, *roots: str) -> None:
        if isinstance(function, FunctionType) and function not in MODULE_METHODS:
            facts = facts_of(function)
            for entry in ((facts, root) for root in roots or facts.parameters[:1]):
                if entry not in self.todo:
                    self.todo.append(entry)

    def function(self, step: Any) -> FunctionType | None:
        if isinstance(step, tuple):
            after, name = step
            value = inherited(self.cls, after, name) if isinstance(after, type) else None
        else:
            value = lookup(self.cls.__mro__, step)
        value = value.fget if isinstance(value, property) else value
        return value if isinstance(value, FunctionType) and value not in MODULE_METHODS else None

    def lead(self, chain: Chain, root: str, is_argument: bool = False, depth: int = 0) -> None:
        """Note the child attribute that a chain leads through, or follow the method that it begins with."""
        steps = [step for step, _ in chain[1] if step != WRAP]
        if chain[0] != root or not steps:
            return
        if function := self.function(steps[0]):
            self.follow(function)
            facts = facts_of(function)
            after = [pair for pair in chain[1] if pair[0] != WRAP][1:]
            after = (
                after[1:] if after and after[0][0] == CALL else after
            )  # the result of a method, like a property's value
            for own, more in facts.returns if depth < 4 else ():
                self.lead((own, (*more, *after)), facts.parameters[0], is_argument, depth + 1)
            return
        rest = steps[1 : steps.index(CALL)] if CALL in steps else steps[1:]
        # The result of a child's forward is not followed: a call counts only after an attribute of the child.
        if (is_argument and CALL not in steps) or any(isinstance(step, str) for step in rest):
            self.names.add(steps[0] if isinstance(steps[0], str) else "*")


MODULE_METHODS = frozenset(value for value in vars(nn.Module).values() if isinstance(value, FunctionType))
