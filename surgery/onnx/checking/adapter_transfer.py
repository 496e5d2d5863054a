"""Converts adapters between a live model and `.onnx_adapter` files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.adapter_files.entry import Entry
from surgery.adapter_files.tensor_files import TensorFile
from surgery.authoring.hook_call import HookCall
from surgery.authoring.rule import Rule, SlotRule
from surgery.errors import LoadError, RuleError, SurgeryError
from surgery.onnx.calls.example import array_of
from surgery.onnx.calls.exported_model import exported_root
from surgery.onnx.graph.slot_insertion import slot_tensors
from surgery.onnx.graph.slot_layout import exactly
from surgery.onnx.runtime.adapter_file import read_adapter, write_adapter
from surgery.onnx.runtime.manifest import Manifest
from surgery.patterns.module_walk import tensor_key
from surgery.state.fingerprint import differences
from surgery.storage.stored_adapter import Stored

__all__ = ["export_adapter", "import_adapter", "slot_arrays"]


def export_adapter(model: nn.Module, name: str, onnx_path: str | Path, out_path: str | Path) -> Path:
    """Write an adapter of a model for the slots of an exported file, in onnxruntime's `.onnx_adapter` format.

    >>> import tempfile, torch
    >>> from torch import nn
    >>> from surgery.rules import LoraRule
    >>> from surgery import apply_rules, export_onnx
    >>> from surgery.onnx import OnnxRunner, export_adapter
    >>> model, x = nn.Sequential(nn.Linear(4, 2)), torch.ones(3, 4)
    >>> _ = apply_rules(model, LoraRule("0", rank=2, init="random"), adapter="red")
    >>> folder = tempfile.mkdtemp()
    >>> report = export_onnx(model, f"{folder}/model.onnx", x, adapters="slots")
    >>> _ = export_adapter(model, "red", report.path, f"{folder}/red.onnx_adapter")
    >>> runner = OnnxRunner(report.path)
    >>> runner.load("red", f"{folder}/red.onnx_adapter")
    >>> torch.allclose(torch.from_numpy(runner.run({"input": x.numpy()}, "red")["output"]), model(x), atol=1e-5)
    True

    Scales (alpha / rank, per site) are folded into the tensors, and DoRA's magnitudes into gains. The adapter may be
    newer than the file; it needs slots at its sites. Any program with onnxruntime can load the result. The write is
    atomic.

    Args:
        model: a model with the adapter.
        name: the adapter's name.
        onnx_path: a file of `export_onnx(…, adapters="slots")`.
        out_path: the file to write.

    Returns:
        `out_path`.

    Raises:
        LoadError: lists what does not fit: another base than the file's, sites without a slot.
    """
    model, manifest = exported_root(model), Manifest.read(onnx_path)
    problems = [SurgeryError(difference, where=str(onnx_path)) for difference in differences(model, manifest.base)]
    try:
        arrays = slot_arrays(model, name, manifest)
    except SurgeryError as error:
        raise LoadError([*problems, error]) from error
    if problems:
        raise LoadError(problems)
    return write_adapter(out_path, arrays, manifest)


def import_adapter(path: str | Path, onnx_path: str | Path) -> Stored:
    """Read an `.onnx_adapter` file for `load_adapter` and `hotswap`.

    >>> import tempfile, torch
    >>> from torch import nn
    >>> from surgery.rules import LoraRule
    >>> from surgery import apply_rules, export_onnx, load_adapter, remove
    >>> from surgery.onnx import export_adapter, import_adapter
    >>> model, x = nn.Sequential(nn.Linear(4, 2)), torch.ones(3, 4)
    >>> _ = apply_rules(model, LoraRule("0", rank=2, alpha=6, init="random"))
    >>> folder, adapted = tempfile.mkdtemp(), model(x)
    >>> report = export_onnx(model, f"{folder}/model.onnx", x, adapters="slots")
    >>> file = export_adapter(model, "default", report.path, f"{folder}/a.onnx_adapter")
    >>> print(load_adapter(remove(model), import_adapter(file, report.path)))
    adapter 'default': 2 tensors loaded
    >>> torch.allclose(model(x), adapted)
    True

    The rules are those of the slots' kinds, with the ranks of the file. LoRA becomes a LoraRule with alpha = rank,
    because the scale is in its tensors.

    Args:
        path: the adapter's file.
        onnx_path: the exported model's file.

    Returns:
        A source for `load_adapter` and `hotswap`.

    Raises:
        LoadError: the file is damaged, or of another base or other slots.
    """
    manifest = Manifest.read(onnx_path)
    arrays = read_adapter(path, manifest)
    rules, tensors = list[tuple[int, Rule, list[str]]](), dict[str, Tensor]()
    for place, site, slot, named in _sites(manifest, arrays):
        with HookCall(slot, "unslotted", site):
            rule, rule_tensors = slot.unslotted({key: _tensor(array) for key, array in named.items()})
        without_targets = rule.replace(targets=(), exclude=(), layers=None, expect=None)
        site_paths = next((paths for index, other, paths in rules if index == place and other == without_targets), None)
        if site_paths is None:
            rules.append((place, without_targets, site_paths := []))
        site_paths.append(site)
        tensors.update({tensor_key(site, key): tensor for key, tensor in rule_tensors.items()})
    file = TensorFile(
        {key: tuple(tensor.shape) for key, tensor in tensors.items()},
        {key: tensor.dtype for key, tensor in tensors.items()},
        {},
        tensors.__getitem__,
    )
    exact_rules = [rule.replace(targets=exactly(paths)) for _, rule, paths in rules]
    return Stored(
        exact_rules, file, lambda plan, step, name: Entry(tensor_key(step.path, name)), base=dict(manifest.base)
    )


def slot_arrays(model: nn.Module, adapter: str, manifest: Manifest) -> dict[str, Any]:
    """Returns an adapter's tensors for a file: slot name → array in the slot's dtype."""
    by_site = {f"{site}:{kind}": slot for (site, kind), slot in _rules_of(manifest).items()}
    by_slot = slot_tensors(model, adapter, by_site, manifest.slot, manifest.constants.get(adapter, ()))
    dtypes = {slot.name: getattr(torch, slot.dtype) for slot in manifest.slots}
    return {name: array_of(tensor.to(dtypes.get(name, tensor.dtype))) for name, tensor in by_slot.items()}


def _rules_of(manifest: Manifest) -> dict[tuple[str, str], SlotRule]:
    """Returns the slots' rules by site and kind."""
    rules = [_slot_rule(Rule.from_dict(data)) for data in manifest.rules]
    return {(site["site"], site["rule"]): rules[site["by"]] for site in manifest.sites}


def _slot_rule(rule: Rule) -> SlotRule:
    if isinstance(rule, SlotRule):
        return rule
    why = f"its manifest names {rule.label} as the rule of a slot, and that class is not a SlotRule"
    raise RuleError("the exported file has no slots for adapters", why=why, fix=f"class {rule.label}(SlotRule)")


def _sites(manifest: Manifest, arrays: Mapping[str, Any]) -> Iterator[tuple[int, str, SlotRule, dict[str, Any]]]:
    """Yields, for each site with tensors, the place of its slot's rule, the path, the rule, and the arrays."""
    rules = _rules_of(manifest)
    places = {(entry["site"], entry["rule"]): entry["by"] for entry in manifest.sites}
    for (site, kind), slots in sorted(manifest.groups.items(), key=lambda group: places[group[0]]):
        named = {slot.tensor: arrays[slot.name] for slot in slots if slot.name in arrays}
        if named:
            yield places[site, kind], site, rules[site, kind], named


def _tensor(array: Any) -> Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("uint16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
