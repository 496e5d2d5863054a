"""Rewritten models as ONNX: adapters folded in, as constants, or as slots that one file has for many of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.fingerprint import fingerprint
from surgery.merge import merge, unmerge
from surgery.onnx.copies import sharing_copy
from surgery.onnx.dims import Dynamic, axes_of, dynamic_shapes, example_for_tracing, rename_dims
from surgery.onnx.finish import add_defaults, make_constants, mark_rules, name_weights, require_inputs, tidy
from surgery.onnx.given import Given
from surgery.onnx.program import Lifted, Program, program_of
from surgery.onnx.slots import SlotSite, lift, put_slots, slot_sites
from surgery.onnx.writing import written
from surgery.rule import Rule
from surgery.state import adapter_names, model_state, require_state, sites

__all__ = ["ExportReport", "export_onnx"]

OPSETS = range(18, 26)


@dataclass
class ExportReport:
    """What an export did: the file, its manifest, what was told on the way, how long it took, and the comparison."""

    path: Path
    manifest: Any
    notices: list[str] = field(default_factory=list)
    seconds: float = 0.0
    nbytes: int = 0
    parity: Any = None


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    adapters: Literal["merged", "constant", "slots"] = "merged",
    names: str | Sequence[str] | None = None,
    slot: str = "slot",
    slots_as: Literal["overridable", "inputs"] = "overridable",
    empty: Literal["rank0", "zeros1"] = "rank0",
    dynamic: Dynamic = True,
    opset: int | None = None,
    optimize: bool = True,
    optimize_for: Literal["ort"] | None = None,
    external_data: bool | int | None = None,
    strict: bool = False,
    verify: bool = True,
    atol: float | None = None,
) -> ExportReport:
    """Write a model as ONNX.

    To be written.
    """
    started = time.perf_counter()
    _check(adapters, slots_as, empty, opset, optimize, optimize_for, slot)
    given = Given.of(model, example_inputs)
    axes = axes_of(given, dynamic)
    prepared = _PREPARE[adapters](model, given, names, slot, empty, strict)
    traced = example_for_tracing(given, axes)
    program = program_of(
        prepared.model, traced, prepared.lifted, dynamic_shapes(traced, axes),
        opset=opset, optimize=optimize, optimize_for=optimize_for,
    )  # fmt: skip
    manifest = _finish(program, prepared, model, axes, adapters, slots_as, empty, slot)
    with written(program.model, Path(path), manifest, external_data) as place:
        if verify:
            pass
    return ExportReport(
        Path(path), manifest, prepared.notices, time.perf_counter() - started, Path(path).stat().st_size
    )


def _check(adapters: Any, slots_as: Any, empty: Any, opset: Any, optimize: bool, optimize_for: Any, slot: Any) -> None:
    for name, value, allowed in (
        ("adapters", adapters, tuple(_PREPARE)),
        ("slots_as", slots_as, ("overridable", "inputs")),
        ("empty", empty, ("rank0", "zeros1")),
        ("optimize_for", optimize_for, (None, "ort")),
    ):
        if value not in allowed:
            raise SurgeryError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}")
    if opset is not None and opset not in OPSETS:
        why = "the exporter writes no older ones" if isinstance(opset, int) and opset < OPSETS[0] else None
        raise SurgeryError(f"opset={opset!r} is none from {OPSETS[0]} to {OPSETS[-1]}", why=why)
    if optimize_for and not optimize:
        raise SurgeryError(f"optimize_for={optimize_for!r} needs optimize=True")
    if not isinstance(slot, str) or not slot.isidentifier():
        raise SurgeryError(f"slot={slot!r} is no word that can name an adapter")


# The model that is exported ---------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """A copy to export from: tensors that become inputs, what slots are by default, and what was told on the way."""

    model: nn.Module
    lifted: list[Lifted] = field(default_factory=list)
    defaults: dict[str, Tensor] = field(default_factory=dict)
    sites: list[SlotSite] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def dims(self) -> dict[str, dict[int, str]]:
        """The free axis of each slot, with its name in the graph."""
        return {
            one.full(key): {axis[0]: ".".join(filter(None, (one.path, axis[1])))}
            for one in self.sites
            for key, (axis, _) in one.tensors.items()
            if axis is not None
        }

    def marks(self) -> dict[str, dict[str, str]]:
        """Which rule put in each tensor, by site."""
        found: dict[str, dict[str, str]] = {}
        for one in self.sites:
            names = {one.full(key): one.rule.label for key in one.tensors}
            found.setdefault(one.path, {}).update(names)
        return found


def _merged(model: nn.Module, given: Given, names: Any, slot: str, empty: str, strict: bool) -> Prepared:
    """With the live adapters in its weights (or those of `names`)."""
    state = model_state(model)
    if state is None:
        return Prepared(sharing_copy(model))
    copy = sharing_copy(model, folding=True)
    wanted = adapter_names(state, names) if names is not None else [n for n in state.adapters if n not in state.idle]
    if names is not None or not any(site.merged is not None for _, _, site in sites(copy)):
        unmerge(copy)
        if wanted:
            merge(copy, wanted, untie=True)
    return Prepared(copy, rules=[rule for name in wanted for rule in state.adapters[name]])


def _constant(model: nn.Module, given: Given, names: Any, slot: str, empty: str, strict: bool) -> Prepared:
    """With the live adapters as they are (or those of `names`), their tensors as initialisers of the graph."""
    from surgery.activation import activate, active

    if model_state(model) is None:
        return Prepared(sharing_copy(model))
    copy = sharing_copy(model)
    unmerge(copy)
    if names is not None:
        activate(copy, names)
    wanted = active(copy)
    found = [site for name in wanted for site in slot_sites(copy, name)]
    lifted = [one for name in wanted for one in lift(copy, name)]
    state = require_state(copy)
    rules = [rule for name in wanted for rule in state.adapters[name]]
    return Prepared(copy, lifted, {one.name: one.tensor for one in lifted}, found, rules)


def _slots(model: nn.Module, given: Given, names: Any, slot: str, empty: str, strict: bool) -> Prepared:
    """With slots in the place of all adapters (or those of `names`)."""
    if model_state(model) is None:
        fix = 'apply_rules(model, …), once for each adapter; or adapters="merged"'
        raise SurgeryError("there is nothing to make slots of", why="no rules were applied to this model", fix=fix)
    copy = sharing_copy(model)
    chosen = adapter_names(require_state(copy), names)
    placing = put_slots(copy, chosen, slot, given, strict=strict)
    lifted = lift(copy, slot, placing.free())
    if empty == "zeros1" and (full := [rule.label for rule in placing.rules if not rule.zeros_are_none]):
        why = "one position of zeros is seen as any other"
        raise SurgeryError(f"empty='zeros1' leaves {', '.join(full)} with an effect", why=why, fix="empty='rank0'")
    defaults = {one.name: _default(one, empty) for one in lifted}
    return Prepared(copy, lifted, defaults, placing.sites, placing.rules, placing.notices)


_PREPARE = {"merged": _merged, "constant": _constant, "slots": _slots}


def _default(one: Lifted, empty: str) -> Tensor:
    """Nothing along the free axis (or, where a runtime can't multiply that, one of zeros); else as the rule starts."""
    if one.free is None:
        return one.tensor
    part = one.tensor.narrow(one.free, 0, 0 if empty == "rank0" else 1)
    return part if empty == "rank0" else torch.zeros_like(part)


# What is done to the graph ----------------------------------------------------------------------------------------


def _finish(
    program: Program,
    prepared: Prepared,
    model: nn.Module,
    axes: Any,
    adapters: str,
    slots_as: str,
    empty: str,
    slot: str,
) -> dict[str, Any]:
    """Names, marks and defaults; gives the manifest."""
    made = program.model
    names = [one.name for one in prepared.lifted]
    require_inputs(made, names, "optimisation")
    name_weights(made, dict(prepared.model.named_parameters(remove_duplicate=False)))
    named = {program.inputs[name]: free for name, free in axes.items()}
    own = {} if adapters == "constant" else prepared.dims()
    free = rename_dims(made, {**named, **own})
    if fixed := [name for name in own if name not in free]:
        why = f"tracing found that the size of {fixed[0]} decides what is computed"
        raise SurgeryError(
            "a slot can't be of any size", where=fixed[0], why=why, fix='adapters="constant" or "merged"'
        )
    mark_rules(made, prepared.marks())
    if adapters == "constant":
        make_constants(made, prepared.defaults)
    else:
        required = names if slots_as == "inputs" else ()
        add_defaults(made, prepared.defaults, required)
    tidy(made)
    return manifest_of(made, program, prepared, model, free, adapters, slots_as, empty, slot)


def manifest_of(
    made: Any, program: Program, prepared: Prepared, model: nn.Module, free: Any, adapters: str, slots_as: str, empty: str,
    slot: str,
) -> dict[str, Any]:  # fmt: skip
    """What a program that runs the file has to know, as plain data."""
    inputs = list(program.inputs.values())
    outputs = [value.name for value in made.graph.outputs]
    slots = [_slot(one, key, slot) for one in prepared.sites for key in one.tensors] if adapters == "slots" else []
    sites = [
        {"site": one.path, "rule": one.kind, "module": one.module, "slots": [one.full(key) for key in one.tensors]}
        for one in (prepared.sites if adapters == "slots" else ())
    ]
    return {
        "format": "model-surgery/onnx",
        "version": 1,
        "adapters": adapters,
        "slots_as": slots_as,
        "empty": empty,
        "slot": slot,
        "slots": slots,
        "sites": sites,
        "rules": [_plain(rule) for rule in prepared.rules],
        "base": fingerprint(prepared.model if adapters == "slots" else model),
        "opset": made.opset_imports.get("", 0),
        "inputs": inputs,
        "outputs": outputs,
        "free": {
            name: {str(axis): dim for axis, dim in found.items()} for name, found in free.items() if name in inputs
        },
        "cache": _cache(inputs, outputs),
        "versions": _versions(),
    }


def _slot(one: SlotSite, key: str, slot: str) -> dict[str, Any]:
    axis, tensor = one.tensors[key]
    shape: list[int | None] = list(tensor.shape)
    if axis is not None:
        shape[axis[0]] = None
    return {
        "name": one.full(key),
        "site": one.path,
        "module": one.module,
        "rule": one.kind,
        "tensor": key,
        "shape": shape,
        "free": [] if axis is None else [axis[0]],
        "dim": None if axis is None else ".".join(filter(None, (one.path, axis[1]))),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "default": "empty" if axis is not None else _told(tensor),
    }


def _told(tensor: Tensor) -> str:
    return "zeros" if not tensor.any() else "ones" if bool((tensor == 1).all()) else "base"


def _plain(rule: Rule) -> Any:
    try:
        return rule.to_dict()
    except SurgeryError:  # a condition in Python, which nothing in the file needs
        return {"rule": rule.name, "version": rule.version}


def _cache(inputs: Sequence[str], outputs: Sequence[str]) -> list[dict[str, str]]:
    """Which output is the next call's input."""
    pairs = [(name, name.replace("past_key_values.", "present.", 1)) for name in inputs]
    return [{"past": past, "present": present} for past, present in pairs if past != present and present in outputs]


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("model-surgery", "torch", "transformers", "onnx", "onnxscript", "onnxruntime"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
