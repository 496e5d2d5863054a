"""`load_surgery`: does to a base what `save_surgery` wrote, completely or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from surgery.adapter_files.entry import MODEL, MODEL_NAME, VERSION, Entry, names_in
from surgery.adapter_files.plain_json import parse_json, read_json
from surgery.adapter_files.tensor_files import TensorFile, open_tensors
from surgery.authoring.rule import Rule
from surgery.errors import LoadError, RuleError, SurgeryError, SurgeryWarning, abbreviate
from surgery.lifecycle.insertion import install_plan
from surgery.lifecycle.switching import switch
from surgery.patterns.wrappers import unwrap
from surgery.peft_format.adapter_config import kept_fields
from surgery.planning.planner import make_plan
from surgery.progress import Progress, each_step
from surgery.rewritten_model.verb_root import check_module, records_in
from surgery.state.fingerprint import differences
from surgery.state.records import ModelState, model_state, require_state
from surgery.state.restructuring import structure_keys
from surgery.storage.load_errors import completed
from surgery.storage.matched_tensors import distrusted_rule_error, misfit_of
from surgery.storage.save_surgery import surgery_tensors
from surgery.transaction.neutral_context import verb

__all__ = ["load_surgery"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class StoredAdapter:
    """One adapter of a surgery in files."""

    name: str
    rules: list[Rule]
    sites: int
    live: bool
    weight: float
    freezes: bool
    peft_fields: Mapping[str, Any]


@verb
def load_surgery(
    model: M,
    folder: str | Path,
    *,
    same_base: bool = True,
    finite: bool = True,
    example_inputs: Any = None,
    trust: bool = False,
    progress: Progress = False,
) -> M:
    """Do to a base what `save_surgery` wrote: apply the rules in their order, and fill their tensors from the files.

    See `save_surgery` for an example. The model computes what the saved model did. The same adapters are live, with
    their weights, and `remove` takes them off.

    Args:
        model: the base, without adapters.
        folder: the folder of `save_surgery`.
        same_base: default True: another base is an error. False: it is a warning.
        finite: default True: NaN and infinity are errors.
        example_inputs: one call of the model, as in `apply_rules`; prefixes need it. Default None.
        trust: accept rules that name code to import, such as ReplaceRule; default False.
        progress: as in `apply_rules`; a step is an adapter. Default False.

    Returns:
        The same model object.

    Raises:
        LoadError: lists what is wrong: files that are absent or damaged, rules that can't be read or applied, missing,
            unexpected or misshapen tensors, another base. The model is unchanged.
        SurgeryError: the model has adapters already.

    Notes:
        Rules are made by their registered names. No code and no path comes from a file.
    """
    check_module(model)
    root = unwrap(model)
    if present := records_in(root):
        raise SurgeryError(
            "the model has adapters already",
            where=abbreviate([path or "(the model itself)" for path in present]),
            why="a surgery begins with the base",
            fix="remove(model) first, or load the base again",
        )
    folder = Path(folder)
    try:
        settings, file = _open(folder)
    except SurgeryError as error:
        raise LoadError(completed([error], folder, "copy the folder of save_surgery again")) from error
    problems: list[SurgeryError] = []
    stored = [adapter for data in settings["adapters"] if (adapter := _read_adapter(data, trust, problems)) is not None]
    if texts := differences(root, settings.get("base")):
        if not same_base:
            warnings.warn(texts[0], SurgeryWarning, stacklevel=3)
        else:
            what, _, why = texts[0].partition(": ")
            fix = "load it on the base that it was made on; load_surgery(…, same_base=False) makes this a warning"
            problems.append(SurgeryError(what, why=why, fix=fix))
    if problems:
        raise LoadError(completed(problems, folder))
    with each_step(stored, progress, "apply") as adapters:
        for number, adapter in enumerate(adapters):
            _apply(root, number, adapter, file, example_inputs, folder)
    state = model_state(root)
    if state is not None:
        _fill(root, state, stored, file, finite, folder)
        switch(root, {adapter.name: adapter.weight for adapter in stored if adapter.live})
    return model


def _open(folder: Path) -> tuple[Mapping[str, Any], TensorFile]:
    """Returns the settings and the tensors of a folder."""
    tensors, settings_file = folder / MODEL[0], folder / MODEL[1]
    file = open_tensors(tensors) if tensors.is_file() else None
    if settings_file.is_file():
        settings = read_json(settings_file)
    elif file is not None and "surgery" in file.metadata:  # a save was interrupted
        settings = parse_json(file.metadata["surgery"], "the metadata of the tensors").get("settings")
    else:
        fix = "load_adapter(model, folder) loads it" if folder.is_dir() and names_in(folder) else None
        why = "it holds an adapter" if fix else f"it does not contain {MODEL[1]}"
        raise SurgeryError("there is no surgery in this folder", why=why, fix=fix or "name the folder of save_surgery")
    if not isinstance(settings, dict) or settings.get("format") != MODEL_NAME:
        raise SurgeryError(f"{MODEL[1]} is not of save_surgery", why=f"its format is not {MODEL_NAME!r}")
    version, adapters = settings.get("version"), settings.get("adapters")
    if type(version) is not int or version < 1:
        raise SurgeryError(f"its version {version!r} is not a version of the format", why="versions count from 1")
    if version > VERSION:
        raise SurgeryError(f"it has version {version} of the format", why="a later release wrote it", fix="update")
    if not isinstance(adapters, list) or not all(isinstance(adapter, dict) for adapter in adapters):
        raise SurgeryError("its settings list no adapters", why=f'"adapters" in {MODEL[1]} is not a list')
    if settings.get("tensors") and file is None:
        raise SurgeryError(f"there is no {MODEL[0]} beside {MODEL[1]}", fix="copy both files")
    if not settings.get("tensors") or file is None:
        file = TensorFile({}, {}, {}, _no_tensor)
    return settings, file


def _no_tensor(key: str) -> Any:
    raise KeyError(key)


def _read_adapter(data: Mapping[str, Any], trust: bool, problems: list[SurgeryError]) -> StoredAdapter | None:
    name, listed, weight, sites = data.get("name"), data.get("rules"), data.get("weight", 1.0), data.get("sites")
    flags = data.get("live", True), data.get("freezes", True)
    if not isinstance(name, str) or not isinstance(listed, list) or type(weight) not in (int, float):
        problems.append(SurgeryError(f"{str(data)[:200]} is not an adapter"))
        return None
    if type(sites) is not int or not all(isinstance(flag, bool) for flag in flags):
        problems.append(SurgeryError(f"{str(data)[:200]} is not an adapter"))
        return None
    rules: list[Rule] = []
    for item in listed:
        try:
            rules.append(Rule.from_dict(item))
        except SurgeryError as error:
            problems.append(error)
        except Exception as error:  # a rule's own checks may fail for fields of any type
            problems.append(RuleError(f"{str(item)[:200]} is not a rule", why=f"{type(error).__name__}: {error}"))
    for rule in rules:
        if rule.imports and not trust:
            problems.append(distrusted_rule_error(rule, "load_surgery"))
    peft = data.get("peft")
    fields = kept_fields(peft) if isinstance(peft, Mapping) else {}
    return StoredAdapter(name, rules, sites, flags[0], float(weight), flags[1], fields)


def _apply(
    root: nn.Module, number: int, adapter: StoredAdapter, file: TensorFile, example_inputs: Any, folder: Path
) -> None:
    """Apply the rules of one adapter. One that was idle becomes idle again, so it may exclude others."""
    state = model_state(root)
    before = _live(state)
    if state is not None and not adapter.live:
        switch(root, {name: weight for name, weight in before.items() if state.standing[name].in_base})
    with torch.random.fork_rng(devices=[]):  # the files have the values
        plan = make_plan(root, adapter.rules, adapter.name, example_inputs, adapter.freezes)
        if plan.problems:
            raise LoadError(completed(plan.problems, folder, "load it on the base that it was made on"))

        def fill_structure() -> None:
            for key, tensor in structure_keys(plan.structure):
                key = f"{number}.{key}"
                if key in file.shapes and file.shapes[key] == tensor.shape and not tensor.whole.is_meta:
                    with torch.no_grad():
                        tensor.values().copy_(file.read(key))

        install_plan(plan, stacklevel=5, fill_structure=fill_structure)
    if not adapter.live:
        switch(root, before)
    require_state(root).peft_fields[adapter.name] = dict(adapter.peft_fields)


def _live(state: ModelState | None) -> dict[str, float]:
    if state is None:
        return {}
    return {name: standing.weight for name, standing in state.standing.items() if standing.live}


def _fill(
    root: nn.Module, state: ModelState, stored: list[StoredAdapter], file: TensorFile, finite: bool, folder: Path
) -> None:
    """Copy the values of the files into the tensors of the adapters."""
    tensors = surgery_tensors(root, state)
    problems: list[SurgeryError] = []
    for adapter in stored:
        present = len(state.places[adapter.name].modules)
        if present != adapter.sites:
            what = f"the rules of {adapter.name!r} match {present} modules, and were on {adapter.sites}"
            problems.append(SurgeryError(what, why="the adapter was copied or combined before the structure changed"))
    for key in tensors.keys() - file.shapes.keys():
        problems.append(SurgeryError(f"the tensor {key} is missing"))
    for key in file.shapes.keys() - tensors.keys():
        problems.append(SurgeryError(f"the tensor {key} is unexpected"))
    for key, tensor in tensors.items():
        if tensor.is_meta:
            problems.append(SurgeryError(f"{key} is on the meta device", fix="give the base its weights first"))
        elif key in file.shapes:
            misfit = misfit_of(file, Entry(key), tuple(tensor.shape), tensor.dtype, finite)
            problems += [SurgeryError(f"{key} {misfit}")] if misfit else []
    if problems:
        raise LoadError(completed(problems, folder, "load it on the base that it was made on"))
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(file.read(key))
