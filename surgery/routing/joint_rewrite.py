"""Records the joint edits of several adapters' rules at one site, for rules that route a batch themselves."""

from __future__ import annotations

from typing import cast

from torch import nn

from surgery.authoring.hook_call import HookCall
from surgery.authoring.routed_site import Member
from surgery.authoring.rule import Routable, Rule
from surgery.errors import SiteError
from surgery.forward.function_watch import FunctionWatch
from surgery.forward.own_forward import OwnForward
from surgery.forward.tape import Layer
from surgery.forward.values import Value
from surgery.state.records import Applied

__all__ = ["routed_layer", "routes_itself"]


def routes_itself(rule: Rule) -> bool:
    """Whether a rule defines `routed`, which lets several rules of its class work on one batch."""
    return type(rule).routed.__func__ is not Routable.routed.__func__  # type: ignore[attr-defined]


def routed_layer(module: nn.Module, path: str, own: OwnForward, applied: list[Applied]) -> Layer:
    """The joint edits of several adapters' rules of one class."""
    kinds = {type(rule_record.rule) for rule_record in applied}
    first = type(applied[0].rule)
    if len(kinds) > 1 or len({rule_record.adapter for rule_record in applied}) < len(applied):
        raise SiteError(
            f"{' and '.join(sorted({rule_record.rule.label for rule_record in applied}))} can't be routed at one site",
            where=path,
            why=f"{first.__name__}s work on a batch together, and with no other rule",
            fix="route them in separate batches",
        )
    members = [
        Member(rule_record.rule, module, path, rule_record.adapter, own, rule_record.facts) for rule_record in applied
    ]
    for member in members[1:]:
        member.tape = members[0].tape
    with HookCall(applied[0].rule, "routed", path), FunctionWatch(members[0].tape):
        output = first.routed(members)
        if output is not None:
            members[0].tape.replace(cast(Value, members[0].output), output)
    return Layer(applied[0].adapter, f"{first.__name__}, routed", members[0].tape.intern())
