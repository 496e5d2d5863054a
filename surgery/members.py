"""Several adapters at one site, each for rows of its own: how a rule that is routed as a whole sees them."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from surgery.base_rule import Rule
from surgery.errors import SiteError
from surgery.hooks import running
from surgery.match import RESERVED
from surgery.own import Own
from surgery.site import Site
from surgery.state import Applied
from surgery.tape import Value
from surgery.watch import Watch
from surgery.weave import Layer

__all__ = ["Member", "routes_itself", "routed_layer"]


class Member(Site):
    """The site as one adapter's rule sees it while a batch is routed: its tensors are its own, the rest is shared.

    `rows.of(size, device)` gives, at a call, the indices of the adapter's rows in a dimension of this size.
    """

    def __init__(self, rule: Rule, module: nn.Module, path: str, adapter: str, own: Own, facts: dict[str, Any]):
        super().__init__(module, path, adapter, rule.label, own, facts=facts)
        self.rule = rule

    @property
    def rows(self) -> Any:
        return self._value("rows", self.adapter)

    def _value(self, kind: str, key: str) -> Tensor:
        if kind == "param":  # named by its adapter: the tape is that of all
            kind, key = "state", f"{RESERVED}.{self.adapter}.{key}"
        return super()._value(kind, key)


def routes_itself(rule: Rule) -> bool:
    """Whether a rule says how several of its kind work on one batch."""
    return type(rule).routed.__func__ is not Rule.routed.__func__  # type: ignore[attr-defined]


def routed_layer(module: nn.Module, path: str, own: Own, applied: list[Applied]) -> Layer:
    """The edits of several adapters' rules of one kind, made together."""
    kinds = {type(one.rule) for one in applied}
    first = type(applied[0].rule)
    if len(kinds) > 1 or len({one.adapter for one in applied}) < len(applied):
        raise SiteError(
            f"{' and '.join(sorted({one.rule.label for one in applied}))} can't be routed at one site",
            where=path,
            why=f"{first.__name__}s work on a batch together, and with no other rule",
            fix="route them in batches of their own",
        )
    members = [Member(one.rule, module, path, one.adapter, own, one.facts) for one in applied]
    for member in members[1:]:
        member.tape = members[0].tape
    with running(applied[0].rule, "routed", path), Watch(members[0].tape):
        output = first.routed(members)
        if output is not None:
            members[0].tape.replace(cast(Value, members[0].output), output)
    return Layer(applied[0].adapter, f"{first.__name__}, routed", members[0].tape.finished())
