"""Slots: places in one graph for the tensors of many adapters, made by rules as any adapter is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.base_rule import Rule
from surgery.engine import apply_rules, remove
from surgery.errors import SurgeryError
from surgery.hooks import running
from surgery.match import RESERVED
from surgery.merging import unmerge
from surgery.onnx.given import Given
from surgery.onnx.program import Lifted
from surgery.peft_targets import regular
from surgery.site import LiveSite
from surgery.state import (
    adapter_names,
    adapter_state_dict,
    load_adapter_state_dict,
    require_state,
    sites,
    tensors_of,
)
from surgery.view import tensor_at

__all__ = ["Placing", "SlotSite", "lift", "put_slots", "slot_sites", "slot_tensors"]

CONSTANT = "constant"  # the adapter of rules that have no slot


@dataclass
class SlotSite:
    """A site with slots: of which rule, and which tensors with which free axis and default."""

    path: str
    adapter: str
    rule: Rule
    module: str
    tensors: dict[str, tuple[tuple[int, str] | None, Tensor]]

    @property
    def kind(self) -> str:
        return self.rule.slot_kind or self.rule.name

    def full(self, key: str) -> str:
        return ".".join(filter(None, (self.path, RESERVED, self.adapter, key)))


@dataclass
class Placing:
    """What was put on a copy of the model: the slots' rules and sites, and what could not be a slot."""

    rules: list[Rule] = field(default_factory=list)
    sites: list[SlotSite] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    constants: dict[str, list[str]] = field(default_factory=dict)  # adapter → names of its rules that are constants

    def free(self) -> dict[str, int | None]:
        """Each tensor's free axis, by its full name."""
        return {one.full(key): axis and axis[0] for one in self.sites for key, (axis, _) in one.tensors.items()}


def put_slots(copy: nn.Module, names: Sequence[str], slot: str, given: Given, *, strict: bool) -> Placing:
    """Put slots for these adapters on a copy of the model, in the place of all its adapters.

    What has no slot and is live stays, as an adapter of its own with fixed tensors; `strict` refuses it.
    """
    placing = Placing()
    unmerge(copy)
    wanted, left = _wanted(copy, names, placing)
    if strict and placing.notices:
        raise SurgeryError(
            "not every rule can be a slot",
            why="; ".join(placing.notices[:8]),
            fix="strict=False exports them as constants",
        )
    if not wanted:
        raise SurgeryError("none of the adapters' rules can be a slot", why="; ".join(placing.notices[:8]) or None)
    remove(copy, check=False)
    if left:
        _put_constants(copy, left, given.example)
    placing.rules = _grouped(wanted)
    try:
        apply_rules(copy, placing.rules, adapter=slot)
    except SurgeryError:  # some rules look at a call first
        apply_rules(copy, placing.rules, adapter=slot, example_inputs=given.example)
    placing.sites = list(slot_sites(copy, slot))
    return placing


def lift(copy: nn.Module, adapter: str, free: Mapping[str, int | None] | None = None) -> list[Lifted]:
    """Take an adapter's tensors out of a copy, to be inputs of the graph."""
    found = []
    for path, module, _ in sites(copy):
        for key in tensors_of(module, adapter):
            box: Any = module.get_submodule(f"{RESERVED}.{adapter}")
            name = ".".join(filter(None, (path, RESERVED, adapter, key)))
            found.append(Lifted.out_of(name, box, key, (free or {}).get(name)))
    return found


def slot_tensors(
    model: nn.Module, adapter: str, slot_rules: Mapping[str, Rule], slot: str, left_out: Collection[str] = ()
) -> dict[str, Tensor]:
    """An adapter's tensors as the slots at its sites want them, by the slots' names: scales folded in, exact shapes.

    `slot_rules`: path:kind → the slot's rule. `left_out`: names of rules that the file holds as constants.
    `SurgeryError` that lists what has no slot.
    """
    adapter_names(require_state(model), adapter)
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for path, module, site in sites(model):
        held = tensors_of(module, adapter)
        for applied in (one for one in site.applied if one.adapter == adapter):
            rule = slot_rules.get(f"{path}:{applied.rule.slot_kind}")
            if rule is None and applied.rule.name in left_out:
                continue
            if rule is None:
                problems.append(f"{applied.rule.label} at {path or 'the model itself'}")
                continue
            live = LiveSite(module, path, adapter, held, lambda name, _, module=module: tensor_at(module, name))
            live.changed = {name: record.change for name, record in applied.changed}
            with torch.no_grad(), running(applied.rule, "slotted", path):
                made = applied.rule.slotted(rule, live)
            for key, tensor in made.items():
                found[".".join(filter(None, (path, RESERVED, slot, key)))] = tensor.detach()
    if problems:
        raise SurgeryError(
            f"the adapter {adapter!r} needs slots that the file does not have",
            why=", ".join(problems[:6]) + (", …" if len(problems) > 6 else ""),
            fix="export the model again with this adapter on it",
        )
    return found


def _wanted(
    copy: nn.Module, names: Sequence[str], placing: Placing
) -> tuple[list[tuple[str, Rule]], list[tuple[Rule, dict[str, Tensor]]]]:
    """The slots' rules with their paths, and what stays constant: (rule, its tensors by full name)."""
    state = require_state(copy)
    wanted: list[tuple[str, Rule]] = []
    none: dict[tuple[str, str], set[str]] = {}
    for path, module, site in sites(copy):
        by_kind: dict[str | None, list[Rule]] = {}
        for applied in site.applied:
            if applied.adapter in names:
                by_kind.setdefault(applied.rule.slot_kind, []).append(applied.rule)
        for kind, rules in by_kind.items():
            made = None
            if kind is not None:
                with running(rules[0], "slot", path):
                    made = type(rules[0]).slot(rules, module, path)
            if made is not None:
                wanted.append((path, made))
            else:
                for rule in rules:
                    none.setdefault((rule.name, rule.label), set()).add(path)
    left: list[tuple[Rule, dict[str, Tensor]]] = []
    for (kind, label), paths in none.items():
        for name in names:
            rules = [rule for rule in state.adapters[name] if rule.name == kind]
            if not rules:
                continue
            live = name not in state.idle
            told = "a constant of the file, for all adapters" if live else "left out, since it is not live"
            placing.notices.append(f"{label} of {name!r} ({len(paths)} sites) can't be a slot: {told}")
            if live:
                placing.constants.setdefault(name, []).append(kind)
                tensors = adapter_state_dict(copy, name)
                here = {key: t.clone() for key, t in tensors.items() if key.rpartition(f".{RESERVED}.")[0] in paths}
                left += [(rule, here) for rule in rules]
    return wanted, left


def _put_constants(copy: nn.Module, kept: Sequence[tuple[Rule, Mapping[str, Tensor]]], example: Any) -> None:
    apply_rules(copy, [rule.alone() for rule, _ in kept], adapter=CONSTANT, example_inputs=example)
    tensors = {key: tensor for _, held in kept for key, tensor in held.items()}
    own = adapter_state_dict(copy, CONSTANT)
    load_adapter_state_dict(copy, {key: tensors.get(key, tensor) for key, tensor in own.items()}, CONSTANT)


def _grouped(wanted: Sequence[tuple[str, Rule]]) -> list[Rule]:
    """As few rules as may be: those that are equal but for their targets are one."""
    groups: list[tuple[Rule, list[str]]] = []
    for path, rule in wanted:
        bare = rule.replace(targets=(), exclude=(), layers=None, expect=None)
        same = next((paths for other, paths in groups if other == bare), None)
        if same is None:
            groups.append((bare, same := []))
        same.append(path)
    return [rule.replace(targets=regular(paths)) for rule, paths in groups]


def slot_sites(copy: nn.Module, slot: str) -> Iterator[SlotSite]:
    """Where an adapter's tensors are."""
    for path, module, site in sites(copy):
        held = tensors_of(module, slot)
        for applied in (one for one in site.applied if one.adapter == slot):
            tensors = {key: (applied.rule.free(key), held[key]) for key in applied.tensors}
            yield SlotSite(path, slot, applied.rule, site.base.__name__, tensors)
