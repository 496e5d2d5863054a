"""Prepares the copy that is exported: with merged adapters, with their tensors as inputs, or with slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.authoring.rule import Rule
from surgery.errors import SurgeryError, abbreviate
from surgery.lifecycle.activation import active
from surgery.merging.merge import merge
from surgery.onnx.calls.example import ExampleCall
from surgery.onnx.calls.shared_copy import leave_live, sharing_copy
from surgery.onnx.graph.lifted_tensors import Lifted
from surgery.onnx.graph.slot_insertion import SlotSite, factors, insert_slots, lift, slot_sites
from surgery.patterns.module_walk import base_modules
from surgery.rewritten_model.verb_root import records_in, root_of
from surgery.state.adapter_naming import adapter_names
from surgery.state.records import merged_adapters, model_state, require_state, sites
from surgery.state.running_statistics import changed_modules
from surgery.transaction.garbage_collection import collector_waits

__all__ = ["PREPARE", "Prepared", "ExportSettings"]

OPSETS = range(18, 26)
BLOCKS = 21  # the first opset whose DequantizeLinear has blocks


@dataclass(frozen=True)
class ExportSettings:
    """The settings of an export; see `export_onnx`. Raises `SurgeryError` for wrong values."""

    adapters: str = "merged"
    slot: str = "slot"
    slots_as: str = "overridable"
    empty: str = "rank0"
    opset: int | None = None
    optimize: bool = True
    optimize_for: str | None = None
    strict: bool = False
    weights: str = "dequantised"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("adapters", tuple(PREPARE)),
            ("slots_as", ("overridable", "inputs")),
            ("empty", ("rank0", "zeros1")),
            ("optimize_for", (None, "ort")),
            ("weights", ("dequantised", "packed")),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise SurgeryError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
        if self.weights == "packed" and (self.opset or BLOCKS) < BLOCKS:
            why = f"DequantizeLinear has blocks of 4 bits from opset {BLOCKS} on"
            raise SurgeryError(f'weights="packed" can\'t be written with opset={self.opset}', why=why, fix="opset=None")
        if self.opset is not None and self.opset not in OPSETS:
            why = f"the exporter writes {OPSETS[0]} to {OPSETS[-1]}"
            raise SurgeryError(f"opset={self.opset!r} can't be written", why=why, fix="use one of these, or None")
        if self.optimize_for and not self.optimize:
            raise SurgeryError(f"optimize_for={self.optimize_for!r} needs optimize=True")
        if not isinstance(self.slot, str) or not self.slot.isidentifier():
            raise SurgeryError(f"slot={self.slot!r} is not a Python identifier")


@dataclass
class Prepared:
    """A copy to export: tensors that become inputs, defaults of slots, and notices."""

    model: nn.Module
    lifted: list[Lifted] = field(default_factory=list)
    defaults: dict[str, Tensor] = field(default_factory=dict)
    sites: list[SlotSite] = field(default_factory=list)
    rules: Sequence[Rule] = ()
    notices: list[str] = field(default_factory=list)
    constants: dict[str, list[str]] = field(default_factory=dict)

    def dims(self) -> dict[str, dict[int, str]]:
        """Returns each slot's free axis with its name in the graph."""
        return {
            site.full_name(key): {axis[0]: ".".join(filter(None, (site.path, axis[1])))}
            for site in self.sites
            for key, (axis, _) in site.tensors.items()
            if axis is not None
        }

    def marks(self) -> dict[str, dict[str, str]]:
        """Returns the rules' labels by site and tensor."""
        dims_by_slot: dict[str, dict[str, str]] = {}
        for site in self.sites:
            names = {site.full_name(key): site.label for key in site.tensors}
            dims_by_slot.setdefault(site.path, {}).update(names)
        return dims_by_slot


@collector_waits()
def _merged(model: nn.Module, example: ExampleCall, names: Any, how: ExportSettings) -> Prepared:
    """Merges the live adapters (or `names`) into the weights."""
    copy = sharing_copy(model, folding=True, dequantise="all")
    for part in records_in(copy, below=True, nested=True).values():  # submodules with records of their own
        _fold(part, active(part))
    state = model_state(model)
    if state is None:
        _check_no_live_sites(copy)
        return Prepared(copy)
    wanted = adapter_names(state, names) if names is not None else list(active(model))
    if names is None:
        _fold(copy, wanted)
    else:
        leave_live(copy, wanted)
        if wanted:
            merge(copy, wanted, untie=True)
    return Prepared(copy, rules=[rule for name in wanted for rule in state.adapters[name]])


def _check_no_live_sites(copy: nn.Module) -> None:
    """Raises `SurgeryError` if this is a submodule with live adapters: the record for merging is on the whole model."""
    if live := [path for path, module, site in sites(copy) if type(module) is not site.base]:
        raise SurgeryError(
            "this is a part of a rewritten model, and its adapters are live",
            where=abbreviate(live),
            why="the record of its rules is kept on the model that apply_rules was called with",
            fix='merge(that model) first, then export the part; or adapters="constant"',
        )


def _fold(copy: nn.Module, wanted: Sequence[str]) -> None:
    """Merges the live adapters, unless adapters are merged already."""
    if wanted and not merged_adapters(copy):
        leave_live(copy, wanted)
        merge(copy, wanted, untie=True)


@collector_waits()
def _constant(model: nn.Module, example: ExampleCall, names: Any, how: ExportSettings) -> Prepared:
    """Keeps the live adapters (or `names`), with their tensors as initialisers of the graph."""
    if model_state(model) is None:
        return Prepared(sharing_copy(model, dequantise="all"))
    copy = sharing_copy(model, dequantise="all")
    leave_live(copy, adapter_names(require_state(copy), names) if names is not None else active(copy))
    wanted = active(copy)
    slot_places = [site for name in wanted for site in slot_sites(copy, name)]
    lifted = [tensor for name in wanted for tensor in lift(copy, name, {}, factors(slot_places))]
    state = require_state(copy)
    rules = [rule for name in wanted for rule in state.adapters[name]]
    return Prepared(copy, lifted, {tensor.name: tensor.tensor for tensor in lifted}, slot_places, rules)


def _check_statistics(model: nn.Module) -> None:
    """Raises `SurgeryError` if training the adapters changed running statistics."""
    if others := changed_modules(require_state(model).moving):
        paths = {id(module): path for path, module in base_modules(model)}
        raise SurgeryError(
            "running statistics moved while the adapters were trained",
            where=abbreviate([paths[id(module)] or "(the model itself)" for module in others if id(module) in paths]),
            why="a file with slots has the base's statistics, and the adapters were trained with others",
            fix='adapters="constant" or "merged"; or train with the statistics frozen: StatisticsRule(frozen=True)',
        )


@collector_waits()
def _slots(model: nn.Module, example: ExampleCall, names: Any, how: ExportSettings) -> Prepared:
    """Replaces all adapters (or `names`) by slots."""
    if model_state(model) is None:
        if records_in(model) or any(True for _ in sites(model)):
            root_of(model)  # its error names the rewritten submodules
        why = "no rules were applied to this model"
        fix = 'apply_rules(model, …), once for each adapter; or adapters="merged"'
        if type(model).__module__.startswith("peft."):
            why, fix = "it is PEFT's own model", "save_pretrained(folder), then load_adapter(base model, folder)"
        raise SurgeryError("there are no rules to make slots of", why=why, fix=fix)
    copy = sharing_copy(model, dequantise="all")
    _check_statistics(copy)
    chosen = adapter_names(require_state(copy), names)
    inserted = insert_slots(copy, chosen, how.slot, example, strict=how.strict)
    lifted = lift(copy, how.slot, inserted.free_axes(), factors(inserted.sites))
    if how.empty == "zeros1" and (full := [rule.label for rule in inserted.rules if not rule.zeros_are_none]):
        why = "a virtual token of zeros still has an effect"
        raise SurgeryError(f"empty='zeros1' leaves {', '.join(full)} with an effect", why=why, fix="empty='rank0'")
    if how.empty == "zeros1" and (grouped := [site.path for site in inserted.sites if _groups(copy, site.path) > 1]):
        why = "the rank of a grouped convolution is a multiple of its groups, so it can't be 1"
        raise SurgeryError("empty='zeros1' is not possible", where=", ".join(grouped[:3]), why=why, fix="empty='rank0'")
    defaults = {tensor.name: _default(tensor, how.empty) for tensor in lifted}
    return Prepared(copy, lifted, defaults, inserted.sites, inserted.rules, inserted.notices, inserted.constants)


def _groups(copy: nn.Module, path: str) -> int:
    return getattr(copy.get_submodule(path), "groups", 1)


PREPARE = {"merged": _merged, "constant": _constant, "slots": _slots}


def _default(tensor: Lifted, empty: str) -> Tensor:
    """Returns a slot's default: empty along the free axis, or one of zeros; without a free axis, the rule's start."""
    if tensor.free is None:
        return tensor.tensor
    part = tensor.tensor.narrow(tensor.free, 0, 0 if empty == "rank0" else 1)
    return part if empty == "rank0" else torch.zeros_like(part)
