"""Chooses the slots at each site and their order, and the rules that have no slot."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from surgery.authoring.hook_call import HookCall
from surgery.authoring.rule import Rule, SlotRule
from surgery.errors import RuleError
from surgery.patterns.paths import regex_for
from surgery.state.records import Applied, ModelState, sites

__all__ = ["SlotLayout", "RemainingRule", "slot_layout", "without_targets", "exactly", "labels_of"]

Kinds = dict[str, SlotRule]  # the slots of a site in their order: kind → rule


R = TypeVar("R", bound=Rule)


@dataclass
class RemainingRule:
    """A live rule without a slot at some sites. `after`: it runs after the slots, else before them."""

    adapter: str
    rule: Rule
    after: bool
    paths: list[str] = field(default_factory=list)


@dataclass
class SlotLayout:
    """The slots of all sites.

    `slots`: rules by site; `labels`: labels of the adapters' rules by site and kind; `remaining`: live rules without a
    slot; `rules_without_slot`: paths by adapter, rule and reason.
    """

    slots: dict[str, Kinds] = field(default_factory=dict)
    labels: dict[tuple[str, str], str] = field(default_factory=dict)
    remaining: list[RemainingRule] = field(default_factory=list)
    rules_without_slot: dict[tuple[str, type[Rule], str], list[str]] = field(default_factory=dict)

    def rules(self) -> list[SlotRule]:
        """Joins rules that differ only in their targets and have the same place in their sites' order."""
        groups: list[tuple[int, SlotRule, list[str]]] = []
        for path, kinds in self.slots.items():
            for place, rule in enumerate(kinds.values()):
                site_paths = next((paths for index, other, paths in groups if index == place and other == rule), None)
                if site_paths is None:
                    groups.append((place, rule, site_paths := []))
                site_paths.append(path)
        return [rule.replace(targets=exactly(paths)) for _, rule, paths in sorted(groups, key=lambda group: group[0])]


def exactly(paths: Sequence[str]) -> str | list[str]:
    """Returns targets that match exactly these modules. The model itself needs a separate target."""
    inner = [path for path in paths if path]
    return regex_for(inner) if len(inner) == len(paths) else ["", *([regex_for(inner)] if inner else [])]


def slot_layout(copy: nn.Module, state: ModelState, names: Sequence[str]) -> SlotLayout:
    """Returns the slots that these adapters need, and the rules without a slot."""
    layout = SlotLayout()
    live = [name for name in names if state.standing[name].live]
    for path, module, site in sites(copy):
        applied_rules = [applied for applied in site.applied if applied.adapter in names]
        kinds, after, why = _site_slots(applied_rules, module, path, live)
        if kinds:
            layout.slots[path] = kinds
        for kind in kinds:
            layout.labels[path, kind] = labels_of(
                applied_rule.rule for applied_rule in applied_rules if applied_rule.rule.slot_kind == kind
            )
        for applied in applied_rules:
            if applied.rule.slot_kind in kinds:
                continue
            rule = applied.rule
            reason = why.get(rule.slot_kind or "", type(rule).why_no_slot)
            layout.rules_without_slot.setdefault((applied.adapter, type(rule), reason), []).append(path)
            if applied.adapter in live:
                _add_remaining(layout.remaining, applied, path, id(applied) in after)
    layout.remaining = [remainder for remainder in layout.remaining if not _is_companion(remainder, layout.remaining)]
    return layout


def without_targets(rule: R) -> R:
    """Returns the rule without targets."""
    return rule.replace(targets=(), exclude=(), layers=None, expect=None)


def labels_of(rules: Iterator[Rule] | Collection[Rule]) -> str:
    return ", ".join(dict.fromkeys(rule.label for rule in rules))


def _site_slots(
    applied_rules: list[Applied], module: nn.Module, path: str, live: Sequence[str]
) -> tuple[Kinds, set[int], dict[str, str]]:
    """Returns a site's slots, the ids of other rules that run after them, and the reason of each kind without a slot.

    The order of the slots must agree with the order of each adapter's rules.
    """
    offered, why = _offered_slots(applied_rules, module, path)
    while True:
        after, blocked = set[int](), None
        orders: list[list[str]] = []
        for name in dict.fromkeys(applied_rule.adapter for applied_rule in applied_rules):
            order: list[str] = []
            constant_before = False
            for applied in (applied_rule for applied_rule in applied_rules if applied_rule.adapter == name):
                kind = applied.rule.slot_kind
                if kind in offered:
                    blocked = kind if constant_before else blocked  # a constant is between this slot and an earlier one
                    order.append(kind)
                elif order and name in live:
                    after.add(id(applied))
                    constant_before = True
            orders.append(order)
        joined_order = _join_orders(orders, offered)
        if blocked is None and len(joined_order) == len(offered):
            return joined_order, after, why
        for kind in [blocked] if blocked is not None else [kind for kind in offered if kind not in joined_order]:
            del offered[kind]
            why[kind] = "the adapters have their rules in contradictory orders"


def _offered_slots(applied_rules: list[Applied], module: nn.Module, path: str) -> tuple[Kinds, dict[str, str]]:
    by_kind: dict[str, list[Applied]] = {}
    for applied in applied_rules:
        if applied.rule.slot_kind is not None:
            by_kind.setdefault(applied.rule.slot_kind, []).append(applied)
    offered: Kinds = {}
    why: dict[str, str] = {}
    for kind, group in by_kind.items():
        if len({applied.adapter for applied in group}) < len(group):
            why[kind] = "an adapter has two rules for the same slot"
            continue
        with HookCall(group[0].rule, "slot", path):
            slot = type(group[0].rule).slot([applied.rule for applied in group], module, path)
        if slot is not None:
            offered[kind] = without_targets(_slot_rule(slot, group[0].rule, path))
    return offered, why


def _slot_rule(slot: Rule, rule: Rule, path: str) -> SlotRule:
    """Returns what a rule's `slot` hook returned. Raises `RuleError` if it is not a `SlotRule`."""
    if isinstance(slot, SlotRule):
        return slot
    raise RuleError(
        f"{rule.label}.slot returned a {type(slot).__name__}",
        where=path or "(the model itself)",
        why="it is not a SlotRule, and the hooks of a slot (`free`, `unslotted`) are defined there",
        fix=f"class {type(slot).__name__}(SlotRule)",
    )


def _join_orders(orders: list[list[str]], offered: Kinds) -> Kinds:
    """Returns the kinds in an order that agrees with each adapter's order. Contradictory kinds are omitted.

    Rules that replace a parameter come first: the other rules see the new parameter in any order.
    """
    kinds_first: Kinds = {kind: rule for kind, rule in offered.items() if rule.slot_first}
    pending = [kind for kind in offered if kind not in kinds_first]
    while True:
        before = {
            kind: {k for order in orders if kind in order for k in order[: order.index(kind)]} for kind in pending
        }
        ready = next((kind for kind in pending if not before[kind] & set(pending)), None)
        if ready is None:
            return kinds_first
        kinds_first[ready] = offered[ready]
        pending.remove(ready)


def _add_remaining(remaining: list[RemainingRule], applied: Applied, path: str, after: bool) -> None:
    rule = without_targets(applied.rule.alone())
    entry = next(
        (
            remainder
            for remainder in remaining
            if (remainder.adapter, remainder.rule, remainder.after) == (applied.adapter, rule, after)
        ),
        None,
    )
    if entry is None:
        remaining.append(entry := RemainingRule(applied.adapter, rule, after))
    entry.paths.append(path)


def _is_companion(candidate: RemainingRule, remaining: Sequence[RemainingRule]) -> bool:
    """Whether another remaining rule brings this rule as its companion."""
    others = [other for other in remaining if other.adapter == candidate.adapter and other is not candidate]
    return any(type(companion) is type(candidate.rule) for other in others for companion in other.rule.companions())
