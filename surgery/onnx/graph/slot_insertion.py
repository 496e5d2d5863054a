"""Inserts slots into a copy of the model: rules whose tensors become inputs for any adapter."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.arithmetic.corrections import Record
from surgery.arithmetic.exact_fold import unfold
from surgery.arithmetic.low_rank import LowRank
from surgery.authoring.hook_call import HookCall
from surgery.authoring.live_site import LiveSite
from surgery.authoring.rule import Rule, SlotRule
from surgery.errors import SurgeryError
from surgery.forward.parameter_view import tensor_at
from surgery.lifecycle.activation import activate
from surgery.lifecycle.insertion import install_plan
from surgery.lifecycle.remove import remove
from surgery.merging.merge import ensure_unmerged
from surgery.onnx.calls.example import ExampleCall
from surgery.onnx.calls.shared_copy import changing
from surgery.onnx.graph.lifted_tensors import Lifted
from surgery.onnx.graph.slot_layout import RemainingRule, exactly, slot_layout
from surgery.packed.packed_weight import PackedWeight, packed_weight_of
from surgery.patterns.module_walk import RESERVED
from surgery.planning.planner import make_plan
from surgery.rewritten_model.state_dict import adapter_state_dict, load_adapter_state_dict
from surgery.state.adapter_naming import adapter_names
from surgery.state.adapter_tensors import tensors_of
from surgery.state.kept_codes import KeptCodes
from surgery.state.records import ModelState, SiteState, model_state, require_state, sites

__all__ = ["InsertedSlots", "SlotSite", "factors", "lift", "insert_slots", "slot_sites", "slot_tensors"]

CONSTANT = "constant"  # prefix of the names of adapters for rules without a slot

Tensors = dict[str, tuple[tuple[int, str] | None, Tensor]]  # name → (free axis and its label, or None; default)


@dataclass
class SlotSite:
    """A site with slots. `label`: the labels of the adapters' rules that use the slots."""

    path: str
    adapter: str
    rule: Rule
    module: str
    tensors: Tensors
    label: str

    @property
    def kind(self) -> str:
        return self.rule.slot_kind or self.rule.name

    def full_name(self, key: str) -> str:
        return ".".join(filter(None, (self.path, RESERVED, self.adapter, key)))


@dataclass
class InsertedSlots:
    """The slots on a copy of the model: their rules and sites, and the rules that became constants."""

    rules: list[SlotRule] = field(default_factory=list)
    sites: list[SlotSite] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    constants: dict[str, list[str]] = field(default_factory=dict)  # adapter → names of its rules that are constants

    def free_axes(self) -> dict[str, int | None]:
        """Returns each tensor's free axis by its full name."""
        return {site.full_name(key): axis and axis[0] for site in self.sites for key, (axis, _) in site.tensors.items()}


def factors(slot_places: Iterable[SlotSite]) -> set[str]:
    """Returns the full names of the low-rank factors of linear layers."""
    linear = [site for site in slot_places if (site.kind, site.module) == ("lora", "Linear")]
    return {site.full_name(key) for site in linear if set(site.tensors) == {"A", "B"} for key in site.tensors}


def insert_slots(
    copy: nn.Module, names: Sequence[str], slot: str, example: ExampleCall, *, strict: bool
) -> InsertedSlots:
    """Replaces all adapters of a copy by slots for these adapters.

    Live rules without a slot become separate adapters with constant tensors, or errors with `strict`.
    """
    inserted = InsertedSlots()
    ensure_unmerged(copy)
    state = require_state(copy)
    layout = slot_layout(copy, state, names)
    for (name, kind, reason), paths in layout.rules_without_slot.items():
        live = state.standing[name].live
        outcome = "a constant of the file, for all adapters" if live else "left out, since it is not live"
        why = f"{kind.__name__} of {name!r} ({len(paths)} sites) can't be a slot: {reason}; it is {outcome}"
        inserted.notices.append(why)
        if live:
            constants_of = inserted.constants.setdefault(name, [])
            constants_of += [kind.name] if kind.name not in constants_of else []
    if strict and inserted.notices:
        raise SurgeryError(
            "not every rule can be a slot",
            why="; ".join(inserted.notices[:8]),
            fix="strict=False exports them as constants",
        )
    if not layout.slots:
        raise SurgeryError("none of the adapters' rules can be a slot", why="; ".join(inserted.notices[:8]) or None)
    constants = [_Constant.of(copy, state, remaining) for remaining in layout.remaining]
    inserted.notices += _changed_at_start(copy, names)
    remove(copy, check=False)
    for constant in (constant for constant in constants if not constant.after):
        constant.insert(copy, example)
    inserted.rules = layout.rules()
    _apply(copy, inserted.rules, slot, example)
    for constant in (constant for constant in constants if constant.after):
        constant.insert(copy, example)
    if any(constant.weight != 1.0 for constant in constants):
        activate(
            copy,
            [slot, *(constant.name for constant in constants)],
            {constant.name: constant.weight for constant in constants},
        )
    inserted.sites = list(slot_sites(copy, slot, layout.labels))
    return inserted


def _apply(copy: nn.Module, rules: Sequence[Rule], adapter: str, example: ExampleCall) -> None:
    try:
        install_plan(make_plan(copy, rules, adapter))
    except SurgeryError:  # some rules need an example call
        install_plan(make_plan(copy, rules, adapter, example.example))


@dataclass
class _Constant:
    """A rule without a slot, which becomes a separate adapter with constant tensors."""

    name: str
    rule: Rule
    tensors: dict[str, Tensor]
    after: bool
    weight: float

    @classmethod
    def of(cls, copy: nn.Module, state: ModelState, remaining: RemainingRule) -> _Constant:
        """Copies the tensors, before the adapters are removed from the copy of the model."""
        tensors = {key: tensor.clone() for key, tensor in adapter_state_dict(copy, remaining.adapter).items()}
        end = "_after" if remaining.after else ""
        name = f"{CONSTANT}_{remaining.adapter}_{remaining.rule.name.replace('-', '_')}{end}"
        rule = remaining.rule.replace(targets=exactly(remaining.paths))
        return cls(name, rule, tensors, remaining.after, state.standing[remaining.adapter].weight)

    def insert(self, copy: nn.Module, example: ExampleCall) -> None:
        used_names = require_state(copy).adapters if model_state(copy) is not None else {}
        self.name = next(name for name in (self.name + "_" * i for i in range(99)) if name not in used_names)
        _apply(copy, [self.rule], self.name, example)
        keys = adapter_state_dict(copy, self.name)
        load_adapter_state_dict(copy, {key: self.tensors[key] for key in keys}, self.name)


def _changed_at_start(copy: nn.Module, names: Sequence[str]) -> list[str]:
    """Notes that the file has the original base, and the model the base that an adapter's start changed."""
    if not (adapters := changing(copy)) or len(names) < 2:
        return []
    quoted = ", ".join(map(repr, sorted(adapters)))
    return [f"{quoted} changed base weights at its start: in the file, the other adapters run on the unchanged base"]


def lift(copy: nn.Module, adapter: str, free: Mapping[str, int | None], factors: Collection[str]) -> list[Lifted]:
    """Lifts an adapter's tensors out of a copy. `factors`: names of tensors that are probably only low-rank factors."""
    slot_places = []
    for path, module, _ in sites(copy):
        for key in tensors_of(module, adapter):
            box: Any = module.get_submodule(f"{RESERVED}.{adapter}")
            name = ".".join(filter(None, (path, RESERVED, adapter, key)))
            slot_places.append(Lifted.lift(name, box, key, free.get(name), name in factors))
    return slot_places


def slot_tensors(
    model: nn.Module, adapter: str, slot_rules: Mapping[str, Rule], slot: str, constant_rules: Collection[str] = ()
) -> dict[str, Tensor]:
    """Returns an adapter's tensors for its sites' slots by slot name, with scales folded in.

    `slot_rules`: path:kind → the slot's rule. `constant_rules`: names of rules that are constants of the file.
    Raises `SurgeryError`, which lists rules without a slot.
    """
    adapter_names(require_state(model), adapter)
    by_slot: dict[str, Tensor] = {}
    problems: list[str] = []
    for path, module, site in sites(model):
        tensors = tensors_of(module, adapter)
        for applied in (other for other in site.applied if other.adapter == adapter):
            rule = slot_rules.get(f"{path}:{applied.rule.slot_kind}")
            if rule is None and applied.rule.name in constant_rules:
                continue
            if rule is None:
                problems.append(f"{applied.rule.label} at {path or 'the model itself'}")
                continue
            source = cache(partial(_base_tensor, module, site, adapter))
            live = LiveSite(module, path, adapter, tensors, lambda name, _, source=source: source(name))
            live.changed = {name: _initial_change(record, source(name), module) for name, record in applied.changed}
            with torch.no_grad(), HookCall(applied.rule, "slotted", path):
                slot_values = applied.rule.slotted(rule, live)
            for key, tensor in slot_values.items():
                by_slot[".".join(filter(None, (path, RESERVED, slot, key)))] = tensor.detach()
    if problems:
        raise SurgeryError(
            f"the adapter {adapter!r} needs slots that the file does not have",
            why=", ".join(problems[:6]) + (", …" if len(problems) > 6 else ""),
            fix="export the model again with this adapter on it",
        )
    return by_slot


def _initial_change(record: Record | KeptCodes, current: Tensor, module: nn.Module) -> LowRank | None:
    """Returns the factors by which an adapter's start changed a weight, computed if only the old weight was kept."""
    if isinstance(record, KeptCodes):
        packed = packed_weight_of(module)
        assert packed is not None
        record = record.as_plain(packed, current.dtype)
    if record.change is not None or record.kept is None:
        return record.change
    U, S, Vh = torch.linalg.svd((current.double().cpu() - record.kept.double().cpu()).flatten(1), full_matrices=False)
    rank = int((S > S[0] * 1e-7).sum())
    dtype = torch.promote_types(current.dtype, torch.float32)
    return LowRank((U[:, :rank] * S[:rank]).to(current.device, dtype), Vh[:rank].to(current.device, dtype))


def _base_tensor(module: nn.Module, site: SiteState, adapter: str, name: str) -> Tensor:
    """Returns a parameter without merged changes and without changes at other adapters' starts (PiSSA)."""
    if name == "weight" and (packed := packed_weight_of(module)) is not None:
        return _base_of_packed(packed, site, adapter)
    tensor = tensor_at(module, name)
    records = [
        record
        for applied in site.applied
        if applied.adapter != adapter
        for parameter, record in applied.changed
        if parameter == name and isinstance(record, Record)
    ]
    records += [
        record for parameter, record in (site.merged.folds if site.merged is not None else ()) if parameter == name
    ]
    if records:
        tensor = tensor.detach().clone()
        for record in reversed(records):
            unfold(tensor, record, check=False)
    return tensor


def slot_sites(copy: nn.Module, slot: str, labels: Mapping[tuple[str, str], str] | None = None) -> Iterator[SlotSite]:
    """Yields an adapter's sites with their tensors. `labels`: by site and kind, the rules that use the slots."""
    for path, module, site in sites(copy):
        tensors, used_labels = tensors_of(module, slot), set[str]()
        for applied in (other for other in site.applied if other.adapter == slot):
            rule = applied.rule
            axes = {key: rule.free(key) if isinstance(rule, SlotRule) else None for key in applied.tensors}
            free = _label_free_axes({key: (axes[key], tensors[key]) for key in axes}, used_labels, str(rule.slot_kind))
            used_labels |= {axis[1] for axis, _ in free.values() if axis is not None}
            label = (labels or {}).get((path, rule.slot_kind or ""), rule.label)
            yield SlotSite(path, slot, rule, site.base.__name__, free, label)


def _label_free_axes(tensors: Tensors, used_labels: Collection[str], kind: str) -> Tensors:
    """Gives each free size of a site its own label; different sizes get different labels.

    In a convolution with groups, A has the ranks of all groups and B the rank of one.
    """
    sizes: dict[str, int] = {}
    for axis, tensor in tensors.values():
        if axis is not None:
            sizes[axis[1]] = min(tensor.shape[axis[0]], sizes.get(axis[1], 1 << 62))
    by_key: Tensors = {}
    for key, (axis, tensor) in tensors.items():
        if axis is not None:
            index, word = axis
            suffix = "" if tensor.shape[index] == sizes[word] else "_of_all"
            axis = index, (f"{kind}_{word}" if word in used_labels else word) + suffix
        by_key[key] = axis, tensor
    return by_key


def _base_of_packed(packed: PackedWeight, site: SiteState, adapter: str) -> Tensor:
    """Returns the dequantised weight. Raises `SurgeryError` if the start of another adapter changed the codes."""
    others = [
        applied.adapter
        for applied in site.applied
        if applied.adapter != adapter and any(isinstance(record, KeptCodes) for _, record in applied.changed)
    ]
    if others:
        raise SurgeryError(
            f"the adapter {adapter!r} can't be read for a slot",
            where=site.path,
            why=f"the start of {others[0]!r} changed the codes of the weight",
            fix=f"remove {others[0]!r} first",
        )
    return packed.dequantise()
