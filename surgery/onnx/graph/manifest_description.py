"""Writes the manifest of an exported file as plain data, for programs that run the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from torch import Tensor, nn

from surgery.authoring.hook_call import HookCall
from surgery.authoring.rule import Rule, SlotRule
from surgery.errors import SurgeryError
from surgery.onnx.graph.prepare import ExportSettings, Prepared
from surgery.onnx.graph.slot_insertion import SlotSite
from surgery.onnx.graph.trace_program import Program
from surgery.onnx.runtime.manifest import HALF
from surgery.state.fingerprint import fingerprint

__all__ = ["manifest_of"]


def manifest_of(
    program: Program, prepared: Prepared, model: nn.Module, free: Mapping[str, Mapping[int, str]], how: ExportSettings
) -> dict[str, Any]:
    """Returns the manifest. `free`: the graph's input → axis → name."""
    graph_model = program.model
    inputs = list(program.inputs.values())
    outputs = [value.name for value in graph_model.graph.outputs]
    slot_sites = prepared.sites if how.adapters == "slots" else []
    sites = [
        {
            "site": site.path,
            "rule": site.kind,
            "module": site.module,
            "slots": [site.full_name(key) for key in site.tensors],
            "by": prepared.rules.index(site.rule),
            **_notes(site, model),
        }
        for site in slot_sites
    ]
    return {
        "format": "model-surgery/onnx",
        "version": 1,
        "adapters": how.adapters,
        "slots_as": how.slots_as,
        "empty": how.empty,
        "slot": how.slot,
        "slots": [_slot(site, key) for site in slot_sites for key in site.tensors],
        "sites": sites,
        "constants": prepared.constants,
        "rules": [_rule_data(rule) for rule in prepared.rules],
        "base": fingerprint(model),
        "opset": graph_model.opset_imports.get("", 0),
        "inputs": inputs,
        "outputs": outputs,
        "free": {name: {str(axis): dim for axis, dim in dims.items()} for name, dims in free.items() if name in inputs},
        "cache": _cache(inputs, outputs),
        HALF: any(str(value.dtype) == "FLOAT16" for value in graph_model.graph.initializers.values()),
        "versions": _versions(),
    }


def _notes(site: SlotSite, model: nn.Module) -> Mapping[str, Any]:
    if not isinstance(site.rule, SlotRule):
        return {}
    with HookCall(site.rule, "slot_notes", site.path):
        return site.rule.slot_notes(model, model.get_submodule(site.path))


def _slot(site: SlotSite, key: str) -> dict[str, Any]:
    axis, tensor = site.tensors[key]
    shape: list[int | None] = list(tensor.shape)
    if axis is not None:
        shape[axis[0]] = None
    return {
        "name": site.full_name(key),
        "site": site.path,
        "module": site.module,
        "rule": site.kind,
        "tensor": key,
        "shape": shape,
        "free": [] if axis is None else [axis[0]],
        "dim": None if axis is None else ".".join(filter(None, (site.path, axis[1]))),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "default": "empty" if axis is not None else _default_of(tensor),
    }


def _default_of(tensor: Tensor) -> str:
    return "zeros" if not tensor.any() else "ones" if bool((tensor == 1).all()) else "base"


def _rule_data(rule: Rule) -> Any:
    try:
        return rule.to_dict()
    except SurgeryError:  # a condition in Python can't be written, and the file does not need it
        return {"rule": rule.name, "version": rule.version}


def _cache(inputs: Sequence[str], outputs: Sequence[str]) -> list[dict[str, str]]:
    """Returns pairs of an output and the input that it becomes in the next call."""
    pairs = [(name, name.replace("past_key_values.", "present.", 1)) for name in inputs]
    return [{"past": past, "present": present} for past, present in pairs if past != present and present in outputs]


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("model-surgery", "torch", "transformers", "onnx", "onnxscript", "onnxruntime"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
