"""The edits of several adapters' rules at one site, made together: what such rules do to one batch."""

from __future__ import annotations

from typing import cast

from torch import nn

from surgery.authoring.hook_call import HookCall
from surgery.authoring.routed_site import Member
from surgery.authoring.rule import Routable, Rule
from surgery.errors import SiteError
from surgery.forward.function_watch import FunctionWatch
from surgery.forward.own_forward import OwnForward
from surgery.forward.tape import Layer, Value
from surgery.state.records import Applied

__all__ = ["routed_layer", "routes_itself"]


def routes_itself(rule: Rule) -> bool:
    """Whether a rule says how several of its kind work on one batch."""
    return type(rule).routed.__func__ is not Routable.routed.__func__  # type: ignore[attr-defined]


def routed_layer(module: nn.Module, path: str, own: OwnForward, applied: list[Applied]) -> Layer:
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
    with HookCall(applied[0].rule, "routed", path), FunctionWatch(members[0].tape):
        output = first.routed(members)
        if output is not None:
            members[0].tape.replace(cast(Value, members[0].output), output)
    return Layer(applied[0].adapter, f"{first.__name__}, routed", members[0].tape.finished())
