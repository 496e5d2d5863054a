"""Which rules of the adapters become slots at each site, in which order, and what has to stay as it is."""

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

__all__ = ["Arranged", "Left", "arranged", "bare", "exactly", "labels_of"]

Kinds = dict[str, SlotRule]  # the slots of a site in their order: kind → rule


R = TypeVar("R", bound=Rule)


@dataclass
class Left:
    """A rule of an adapter that stays a constant at some sites; `after` the slots there, or before them."""

    adapter: str
    rule: Rule
    after: bool
    paths: list[str] = field(default_factory=list)


@dataclass
class Arranged:
    """`slots`: rules by site; `labels`: the adapters' own rules in each, by site and kind; `left`: what stays; `none`:
    the paths of what is no slot, by adapter, rule and reason."""

    slots: dict[str, Kinds] = field(default_factory=dict)
    labels: dict[tuple[str, str], str] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    none: dict[tuple[str, type[Rule], str], list[str]] = field(default_factory=dict)

    def rules(self) -> list[SlotRule]:
        """As few rules as may be: those that are equal but for their targets are one, where no site's order minds."""
        groups: list[tuple[int, SlotRule, list[str]]] = []
        for path, kinds in self.slots.items():
            for place, rule in enumerate(kinds.values()):
                same = next((paths for at, other, paths in groups if at == place and other == rule), None)
                if same is None:
                    groups.append((place, rule, same := []))
                same.append(path)
        return [rule.replace(targets=exactly(paths)) for _, rule, paths in sorted(groups, key=lambda group: group[0])]


def exactly(paths: Sequence[str]) -> str | list[str]:
    """Targets for these modules alone; no expression means the model itself."""
    inner = [path for path in paths if path]
    return regex_for(inner) if len(inner) == len(paths) else ["", *([regex_for(inner)] if inner else [])]


def arranged(copy: nn.Module, state: ModelState, names: Sequence[str]) -> Arranged:
    """The slots that these adapters need, and the rules of live ones that can't be in one."""
    layout = Arranged()
    live = [name for name in names if state.standing[name].live]
    for path, module, site in sites(copy):
        here = [applied for applied in site.applied if applied.adapter in names]
        kinds, after, why = _at(here, module, path, live)
        if kinds:
            layout.slots[path] = kinds
        for kind in kinds:
            layout.labels[path, kind] = labels_of(
                applied_rule.rule for applied_rule in here if applied_rule.rule.slot_kind == kind
            )
        for applied in here:
            if applied.rule.slot_kind in kinds:
                continue
            rule = applied.rule
            reason = why.get(rule.slot_kind or "", type(rule).why_no_slot)
            layout.none.setdefault((applied.adapter, type(rule), reason), []).append(path)
            if applied.adapter in live:
                _leave(layout.left, applied, path, id(applied) in after)
    layout.left = [remainder for remainder in layout.left if not _comes_along(remainder, layout.left)]
    return layout


def bare(rule: R) -> R:
    """The rule without a word on where it goes."""
    return rule.replace(targets=(), exclude=(), layers=None, expect=None)


def labels_of(rules: Iterator[Rule] | Collection[Rule]) -> str:
    return ", ".join(dict.fromkeys(rule.label for rule in rules))


def _at(
    here: list[Applied], module: nn.Module, path: str, live: Sequence[str]
) -> tuple[Kinds, set[int], dict[str, str]]:
    """The slots at a site, which of the other rules come after them, and why kinds have none.

    The adapters' rules stand in an order there, and the slots must stand in one that is all of theirs.
    """
    offered, why = _offered(here, module, path)
    while True:
        after, barred = set[int](), None
        orders: list[list[str]] = []
        for name in dict.fromkeys(applied_rule.adapter for applied_rule in here):
            order: list[str] = []
            waits = False
            for applied in (applied_rule for applied_rule in here if applied_rule.adapter == name):
                kind = applied.rule.slot_kind
                if kind in offered:
                    barred = kind if waits else barred  # a constant stands between it and a slot before
                    order.append(kind)
                elif order and name in live:
                    after.add(id(applied))
                    waits = True
            orders.append(order)
        joined_order = _joined(orders, offered)
        if barred is None and len(joined_order) == len(offered):
            return joined_order, after, why
        for kind in [barred] if barred is not None else [kind for kind in offered if kind not in joined_order]:
            del offered[kind]
            why[kind] = "the adapters' rules stand there in orders that no one order holds"


def _offered(here: list[Applied], module: nn.Module, path: str) -> tuple[Kinds, dict[str, str]]:
    by_kind: dict[str, list[Applied]] = {}
    for applied in here:
        if applied.rule.slot_kind is not None:
            by_kind.setdefault(applied.rule.slot_kind, []).append(applied)
    offered: Kinds = {}
    why: dict[str, str] = {}
    for kind, group in by_kind.items():
        if len({applied.adapter for applied in group}) < len(group):
            why[kind] = "an adapter has two rules for one slot there"
            continue
        with HookCall(group[0].rule, "slot", path):
            slot = type(group[0].rule).slot([applied.rule for applied in group], module, path)
        if slot is not None:
            offered[kind] = bare(_slot_rule(slot, group[0].rule, path))
    return offered, why


def _slot_rule(slot: Rule, rule: Rule, path: str) -> SlotRule:
    """What a rule's `slot` hook returned. `RuleError` if it is not a `SlotRule`."""
    if isinstance(slot, SlotRule):
        return slot
    raise RuleError(
        f"{rule.label}.slot returned a {type(slot).__name__}",
        where=path or "(the model itself)",
        why="it is not a SlotRule, and the hooks of a slot (`free`, `unslotted`) are defined there",
        fix=f"class {type(slot).__name__}(SlotRule)",
    )


def _joined(orders: list[list[str]], offered: Kinds) -> Kinds:
    """The kinds in an order that each adapter's is a part of; those that are in none such are left out.

    What puts a parameter in the base's place comes first wherever it stands: others see it either way.
    """
    kinds_first: Kinds = {kind: rule for kind, rule in offered.items() if rule.slot_first}
    waiting = [kind for kind in offered if kind not in kinds_first]
    while True:
        before = {
            kind: {k for order in orders if kind in order for k in order[: order.index(kind)]} for kind in waiting
        }
        ready = next((kind for kind in waiting if not before[kind] & set(waiting)), None)
        if ready is None:
            return kinds_first
        kinds_first[ready] = offered[ready]
        waiting.remove(ready)


def _leave(left: list[Left], applied: Applied, path: str, after: bool) -> None:
    rule = bare(applied.rule.alone())
    same = next(
        (
            remainder
            for remainder in left
            if (remainder.adapter, remainder.rule, remainder.after) == (applied.adapter, rule, after)
        ),
        None,
    )
    if same is None:
        left.append(same := Left(applied.adapter, rule, after))
    same.paths.append(path)


def _comes_along(candidate: Left, left: Sequence[Left]) -> bool:
    """Whether another rule that stays brings this one with it."""
    others = [other for other in left if other.adapter == candidate.adapter and other is not candidate]
    return any(type(companion) is type(candidate.rule) for other in others for companion in other.rule.companions())
