"""Slots: places in one graph for the tensors of many adapters, made by rules as any adapter is."""

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
from surgery.onnx.graph.slot_layout import Left, arranged, exactly
from surgery.onnx.graph.trace_program import Lifted
from surgery.patterns.module_walk import RESERVED
from surgery.planning.planner import make_plan
from surgery.rewritten_model.state_dict import adapter_state_dict, load_adapter_state_dict
from surgery.state.adapter_naming import adapter_names
from surgery.state.adapter_tensors import tensors_of
from surgery.state.records import ModelState, SiteState, model_state, require_state, sites

__all__ = ["Placing", "SlotSite", "factors", "lift", "put_slots", "slot_sites", "slot_tensors"]

CONSTANT = "constant"  # begins the name of the adapters of rules that have no slot

Tensors = dict[str, tuple[tuple[int, str] | None, Tensor]]  # name → its free axis with a word for it, and the default


@dataclass
class SlotSite:
    """A site with slots: their rule, each tensor with its free axis and default, and the label of their own rules."""

    path: str
    adapter: str
    rule: Rule
    module: str
    tensors: Tensors
    label: str

    @property
    def kind(self) -> str:
        return self.rule.slot_kind or self.rule.name

    def full(self, key: str) -> str:
        return ".".join(filter(None, (self.path, RESERVED, self.adapter, key)))


@dataclass
class Placing:
    """What was put on a copy of the model: the slots' rules and sites, and what could not be a slot."""

    rules: list[SlotRule] = field(default_factory=list)
    sites: list[SlotSite] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    constants: dict[str, list[str]] = field(default_factory=dict)  # adapter → names of its rules that are constants

    def free(self) -> dict[str, int | None]:
        """Each tensor's free axis, by its full name."""
        return {site.full(key): axis and axis[0] for site in self.sites for key, (axis, _) in site.tensors.items()}


def factors(slot_places: Iterable[SlotSite]) -> set[str]:
    """The low-rank factors of linear layers, by their full names."""
    linear = [site for site in slot_places if (site.kind, site.module) == ("lora", "Linear")]
    return {site.full(key) for site in linear if set(site.tensors) == {"A", "B"} for key in site.tensors}


def put_slots(copy: nn.Module, names: Sequence[str], slot: str, example: ExampleCall, *, strict: bool) -> Placing:
    """Put slots for these adapters on a copy of the model, in the place of all its adapters.

    What has no slot and is live stays, as adapters of their own with fixed tensors; `strict` refuses it.
    """
    placing = Placing()
    ensure_unmerged(copy)
    state = require_state(copy)
    layout = arranged(copy, state, names)
    for (name, kind, reason), paths in layout.none.items():
        live = state.standing[name].live
        outcome = "a constant of the file, for all adapters" if live else "left out, since it is not live"
        why = f"{kind.__name__} of {name!r} ({len(paths)} sites) can't be a slot: {reason}; it is {outcome}"
        placing.notices.append(why)
        if live:
            constants_of = placing.constants.setdefault(name, [])
            constants_of += [kind.name] if kind.name not in constants_of else []
    if strict and placing.notices:
        raise SurgeryError(
            "not every rule can be a slot",
            why="; ".join(placing.notices[:8]),
            fix="strict=False exports them as constants",
        )
    if not layout.slots:
        raise SurgeryError("none of the adapters' rules can be a slot", why="; ".join(placing.notices[:8]) or None)
    constants = [_Constant.of(copy, state, left) for left in layout.left]
    placing.notices += _changed_at_start(copy, names)
    remove(copy, check=False)
    for constant in (constant for constant in constants if not constant.after):
        constant.insert(copy, example)
    placing.rules = layout.rules()
    _apply(copy, placing.rules, slot, example)
    for constant in (one for one in constants if one.after):
        constant.insert(copy, example)
    if any(constant.weight != 1.0 for constant in constants):
        activate(
            copy,
            [slot, *(constant.name for constant in constants)],
            {constant.name: constant.weight for constant in constants},
        )
    placing.sites = list(slot_sites(copy, slot, layout.labels))
    return placing


def _apply(copy: nn.Module, rules: Sequence[Rule], adapter: str, example: ExampleCall) -> None:
    try:
        install_plan(make_plan(copy, rules, adapter))
    except SurgeryError:  # some rules look at a call first
        install_plan(make_plan(copy, rules, adapter, example.example))


@dataclass
class _Constant:
    """A rule that stays as it is, as an adapter of its own."""

    name: str
    rule: Rule
    tensors: dict[str, Tensor]
    after: bool
    weight: float

    @classmethod
    def of(cls, copy: nn.Module, state: ModelState, left: Left) -> _Constant:
        """With its tensors, before the adapters are taken off the copy."""
        tensors = {key: tensor.clone() for key, tensor in adapter_state_dict(copy, left.adapter).items()}
        end = "_after" if left.after else ""
        name = f"{CONSTANT}_{left.adapter}_{left.rule.name.replace('-', '_')}{end}"
        rule = left.rule.replace(targets=exactly(left.paths))
        return cls(name, rule, tensors, left.after, state.standing[left.adapter].weight)

    def insert(self, copy: nn.Module, example: ExampleCall) -> None:
        taken = require_state(copy).adapters if model_state(copy) is not None else {}
        self.name = next(name for name in (self.name + "_" * i for i in range(99)) if name not in taken)
        _apply(copy, [self.rule], self.name, example)
        own = adapter_state_dict(copy, self.name)
        load_adapter_state_dict(copy, {key: self.tensors[key] for key in own}, self.name)


def _changed_at_start(copy: nn.Module, names: Sequence[str]) -> list[str]:
    """In the file the base is the model's own; in the model it is what an adapter's start made of it."""
    if not (adapters := changing(copy)) or len(names) < 2:
        return []
    quoted = ", ".join(map(repr, sorted(adapters)))
    return [f"{quoted} changed base weights at its start: in the file the others run on the base as it was before"]


def lift(copy: nn.Module, adapter: str, free: Mapping[str, int | None], factors: Collection[str]) -> list[Lifted]:
    """Take an adapter's tensors out of a copy, to be inputs of the graph; `factors`: those that seem to be no more."""
    slot_places = []
    for path, module, _ in sites(copy):
        for key in tensors_of(module, adapter):
            box: Any = module.get_submodule(f"{RESERVED}.{adapter}")
            name = ".".join(filter(None, (path, RESERVED, adapter, key)))
            slot_places.append(Lifted.out_of(name, box, key, free.get(name), name in factors))
    return slot_places


def slot_tensors(
    model: nn.Module, adapter: str, slot_rules: Mapping[str, Rule], slot: str, left_out: Collection[str] = ()
) -> dict[str, Tensor]:
    """An adapter's tensors as the slots at its sites want them, by the slots' names: scales folded in, exact shapes.

    `slot_rules`: path:kind → the slot's rule. `left_out`: names of rules that the file holds as constants.
    `SurgeryError` that lists what has no slot.
    """
    adapter_names(require_state(model), adapter)
    by_slot: dict[str, Tensor] = {}
    problems: list[str] = []
    for path, module, site in sites(model):
        tensors = tensors_of(module, adapter)
        for applied in (other for other in site.applied if other.adapter == adapter):
            rule = slot_rules.get(f"{path}:{applied.rule.slot_kind}")
            if rule is None and applied.rule.name in left_out:
                continue
            if rule is None:
                problems.append(f"{applied.rule.label} at {path or 'the model itself'}")
                continue
            source = cache(partial(_base_tensor, module, site, adapter))
            live = LiveSite(module, path, adapter, tensors, lambda name, _, source=source: source(name))
            live.changed = {name: _started(record, source(name)) for name, record in applied.changed}
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


def _started(record: Record, now: Tensor) -> LowRank | None:
    """How an adapter's start changed a weight, in factors; where the weight itself was kept, they are found anew."""
    if record.change is not None or record.kept is None:
        return record.change
    U, S, Vh = torch.linalg.svd((now.double().cpu() - record.kept.double().cpu()).flatten(1), full_matrices=False)
    rank = int((S > S[0] * 1e-7).sum())
    dtype = torch.promote_types(now.dtype, torch.float32)
    return LowRank((U[:, :rank] * S[:rank]).to(now.device, dtype), Vh[:rank].to(now.device, dtype))


def _base_tensor(module: nn.Module, site: SiteState, adapter: str, name: str) -> Tensor:
    """A parameter as an adapter alone finds it: nothing merged, and not as others' starts left it (PiSSA)."""
    tensor = tensor_at(module, name)
    records = [
        record for applied in site.applied if applied.adapter != adapter for at, record in applied.changed if at == name
    ]
    records += [record for at, record in (site.merged.folds if site.merged is not None else ()) if at == name]
    if records:
        tensor = tensor.detach().clone()
        for record in reversed(records):
            unfold(tensor, record, check=False)
    return tensor


def slot_sites(copy: nn.Module, slot: str, labels: Mapping[tuple[str, str], str] | None = None) -> Iterator[SlotSite]:
    """Where an adapter's tensors are; `labels`: by site and kind, of the rules whose slots they are."""
    for path, module, site in sites(copy):
        tensors, taken = tensors_of(module, slot), set[str]()
        for applied in (other for other in site.applied if other.adapter == slot):
            rule = applied.rule
            axes = {key: rule.free(key) if isinstance(rule, SlotRule) else None for key in applied.tensors}
            free = _told_apart({key: (axes[key], tensors[key]) for key in axes}, taken, str(rule.slot_kind))
            taken |= {axis[1] for axis, _ in free.values() if axis is not None}
            label = (labels or {}).get((path, rule.slot_kind or ""), rule.label)
            yield SlotSite(path, slot, rule, site.base.__name__, free, label)


def _told_apart(tensors: Tensors, taken: Collection[str], kind: str) -> Tensors:
    """Words for free sizes that no other slot of the site has, and of which each is of one size.

    A convolution's groups make one: A has ranks for all of them, B for one.
    """
    sizes: dict[str, int] = {}
    for axis, tensor in tensors.values():
        if axis is not None:
            sizes[axis[1]] = min(tensor.shape[axis[0]], sizes.get(axis[1], 1 << 62))
    by_key: Tensors = {}
    for key, (axis, tensor) in tensors.items():
        if axis is not None:
            at, word = axis
            more = "" if tensor.shape[at] == sizes[word] else "_of_all"
            axis = at, (f"{kind}_{word}" if word in taken else word) + more
        by_key[key] = axis, tensor
    return by_key
