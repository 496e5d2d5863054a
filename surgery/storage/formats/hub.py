"""Puts the intermediate form onto a model, in PEFT's terms: each kind of change is read as an adapter of PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from surgery.adapter_files.entry import Entry
from surgery.adapter_files.tensor_files import TensorFile
from surgery.authoring.planned_rule import PlannedRule
from surgery.errors import SurgeryError
from surgery.peft_format.key_history import PREFIX, Spelt
from surgery.peft_format.keys import keys_of
from surgery.peft_format.reading import PeftAdapter, read
from surgery.peft_format.targets import Modules
from surgery.planning.plan import Plan
from surgery.state.base_tensors import base_tensor
from surgery.storage.formats.base_facts import components_in
from surgery.storage.formats.contents import Change, Contents
from surgery.storage.formats.file_tensor import FileTensor
from surgery.storage.formats.fitting import fitted_change
from surgery.storage.formats.peft_settings import peft_fields
from surgery.storage.formats.table import format_named

__all__ = ["OnModel", "on_model"]


@dataclass
class OnModel:
    """An adapter in PEFT's terms: its tensors under PEFT's keys, and what was read of them."""

    file: TensorFile
    adapters: list[PeftAdapter]
    entry: Callable[[Plan, PlannedRule, str], Entry | None]
    assumed: list[str]


def on_model(contents: Contents, model: nn.Module, component: str | None, metadata: Mapping[str, str]) -> OnModel:
    """The adapter of a component for a model. `component`: which one; None: the one whose modules the model has."""
    modules = Modules.of(model)
    if component is None and (here := [name for name in components_in(model) if name in contents.changes]):
        contents = _joined(contents, here, modules)
        chosen, spelt = "", Spelt({})
    else:
        chosen, spelt = _component(contents, modules, component)
    assumed = list(contents.assumed)
    changes = contents.changes[chosen]
    assumed += contents.assumed_of.get(chosen, [])
    if len(contents.changes) > 1:
        assumed.append(f"of a file of several components, {chosen} was loaded")
    fitted = {
        path: fitted_change(change, (here := spelt.moved.get(path, path)), modules.by_path.get(here), assumed)
        for path, change in changes.items()
    }
    groups: dict[tuple[Any, ...], dict[str, Change]] = {}
    for path, change in fitted.items():
        groups.setdefault(_group(path, change), {})[path] = change
    adapters: list[PeftAdapter] = []
    shapes: dict[str, FileTensor] = {}
    by_path: dict[str, PeftAdapter] = {}
    for group in groups.values():
        config = _norm_fields(group) if _is_norm(group) else peft_fields(group)
        if config["peft_type"] == "LORA":
            named = {"lora_dropout": "dropout", "alora_invocation_tokens": "invocation"}
            config |= {name: contents.settings[ours] for name, ours in named.items() if contents.settings.get(ours)}
        tensors = _norm_tensors(group, modules, spelt) if _is_norm(group) else _peft_tensors(group)
        adapter = read(model, config, _file(tensors, metadata))
        by_path |= dict.fromkeys((spelt.moved.get(path, path) for path in group), adapter)
        adapters.append(adapter)
        shapes |= tensors
    moved = [note for adapter in adapters for note in adapter.assumed]

    def entry(plan: Plan, step: PlannedRule, name: str) -> Entry | None:
        return by_path[step.path].entry(plan, step, name)

    return OnModel(_file(shapes, metadata), adapters, entry, [*assumed, *dict.fromkeys(moved)])


def _joined(contents: Contents, components: list[str], modules: Modules) -> Contents:
    """The changes of components that stand in one module, under the module's paths."""
    changes: dict[str, Change] = {}
    assumed = list(contents.assumed)
    for name in components:
        start, inner = f"{name}.", contents.changes[name]
        there = {path.removeprefix(start): each for path, each in modules.by_path.items() if path.startswith(start)}
        moved = keys_of(there, _file(_any_tensors(inner), {})).moved
        changes |= {start + moved.get(path, path): change for path, change in inner.items()}
        assumed += contents.assumed_of.get(name, [])
    if left := [name for name in contents.changes if name not in components]:
        assumed.append(
            f"of a file of several components, {', '.join(components)} were loaded, and not {', '.join(left)}"
        )
    return replace(contents, changes={"": changes}, assumed=assumed, assumed_of={})


def _component(contents: Contents, modules: Modules, wanted: str | None) -> tuple[str, Spelt]:
    """The component of the model, and how the paths of the file are spelt there."""
    tensors: dict[str, FileTensor] = {}
    for component, changes in contents.changes.items():
        start = f"{component}." if component else ""
        tensors |= {start + key: tensor for key, tensor in _any_tensors(changes).items()}
    if wanted is None and len(contents.changes) == 1:
        (only,) = contents.changes
        inner = {key.removeprefix(f"{only}.") if only else key: value for key, value in tensors.items()}
        return only, keys_of(modules.by_path, _file(inner, {}))
    spelt = keys_of(modules.by_path, _file(tensors, {}), wanted)
    if spelt.component not in contents.changes:
        known = ", ".join(contents.changes)
        raise SurgeryError(
            "the model is none of the components of the file",
            where=known,
            why="none of their modules is a module of the model",
            fix=f"load_adapter(…, component={next(iter(contents.changes))!r}) names the component",
        )
    return spelt.component, spelt


def _any_tensors(changes: Mapping[str, Change]) -> dict[str, FileTensor]:
    """A tensor of each change, under a key of PEFT's."""
    first = {path: next(iter(change.tensors.values())) for path, change in changes.items()}
    return {f"{path}.lora_A.weight": change.tensors.get("A", first[path]) for path, change in changes.items()}


def _group(path: str, change: Change) -> tuple[Any, ...]:
    """Changes of one group are one adapter of PEFT's."""
    names = set(change.tensors)
    kind, dora = change.kind, "magnitude" in names
    if kind in ("loha", "lokr") and dora:
        why = f"a magnitude (DoRA) beside a {kind} is not a rule here"
        raise SurgeryError("the change can't be represented exactly", where=change.tensors["magnitude"].key, why=why)
    if kind in ("norm difference", "value"):
        return ("norm",)
    return kind, dora, "B_bias" in names, "hada_t1" in names or "lokr_t2" in names, *change.fields.items()


def _is_norm(group: Mapping[str, Change]) -> bool:
    return all(change.kind in ("norm difference", "value") for change in group.values())


def _norm_fields(group: Mapping[str, Change]) -> dict[str, Any]:
    return {"peft_type": "LN_TUNING", "target_modules": list(group)}


def _norm_tensors(group: Mapping[str, Change], modules: Modules, spelt: Spelt) -> dict[str, FileTensor]:
    """Whole parameters of normalisation layers: those of the file, or the model's plus a difference."""
    tensors: dict[str, FileTensor] = {}
    for path, change in group.items():
        here = spelt.moved.get(path, path)
        module = modules.by_path.get(here)
        if module is None:
            raise SurgeryError("the model has no such module", where=change.key, why=f"it is {path} here")
        stored = {"weight": change.tensors.get("value", change.tensors.get("w_norm"))}
        stored["bias"] = change.tensors.get("b_norm")
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            tensor = stored.pop(name, None)
            whole = FileTensor.of(base_tensor(module, name, here))
            if tensor is not None and tensor.shape != whole.shape:
                why = f"its shape is {tensor.shape}, and that of {here}.{name} is {whole.shape}"
                raise SurgeryError("a tensor does not fit", where=tensor.key, why=why)
            if tensor is not None:
                whole = tensor if change.kind == "value" else _sum(whole, tensor)
            tensors[f"{PREFIX}{path}.ln_tuning_layers.{name}"] = whole
        if left := [tensor.key for tensor in stored.values() if tensor is not None]:
            raise SurgeryError("the module has no such parameter", where=left[0], why=f"it is {here} here")
    return tensors


def _sum(base: FileTensor, change: FileTensor) -> FileTensor:
    return FileTensor(base.shape, base.dtype, lambda: base.read() + change.read().to(base.dtype), change.key)


def _peft_tensors(group: Mapping[str, Change]) -> dict[str, FileTensor]:
    keys = format_named("peft").keys
    tensors: dict[str, FileTensor] = {}
    for path, change in group.items():
        for part, tensor in change.tensors.items():
            key = next(key for key in keys if key.part == part and key.embedding in (change.embedding, False))
            if change.embedding and part in "AB":
                key = next(key for key in keys if key.part == part and key.embedding)
            tensors[f"{PREFIX}{path}{key.ending}"] = tensor
    return tensors


def _file(tensors: Mapping[str, FileTensor], metadata: Mapping[str, str]) -> TensorFile:
    kept = {name: text for name, text in metadata.items() if name != "lora_adapter_metadata"}
    return TensorFile(
        {key: tensor.shape for key, tensor in tensors.items()},
        {key: tensor.dtype for key, tensor in tensors.items()},
        kept,
        lambda key: tensors[key].read(),
    )
