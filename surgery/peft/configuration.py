"""A configuration on its way onto a model: whether its targets match, and the object that the façade keeps."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

from torch import nn

from surgery.errors import MatchError, SurgeryError
from surgery.patterns.paths import select_targets
from surgery.peft.base_config import PeftConfig, own_class
from surgery.peft.errors import NoMatchingPeftModuleError, PeftRuntimeWarning, as_builtin
from surgery.peft_format.key_history import PREFIX
from surgery.peft_format.methods import method_of, rules_by
from surgery.peft_format.targets import Modules, chosen_by
from surgery.planning.matching import Tree, matches

__all__ = ["check_targets", "completed", "on_tensors", "targeted_parameters"]


def completed(config: Any, resolved: PeftConfig) -> PeftConfig:
    """The user's configuration with the fields that were filled in; one of PEFT's own as ours.

    PEFT keeps the object that it is given, too, so that code may look at it or change it afterwards.
    """
    if own_class(type(config)) is not type(resolved):
        return resolved
    for field in fields(resolved):
        setattr(config, field.name, getattr(resolved, field.name))
    return config


def on_tensors(config: PeftConfig, model: nn.Module, keys: Iterable[str]) -> PeftConfig:
    """The configuration with the modules as targets that a state dict has tensors of; it warns where they differ.

    The values of the tensors are not used, as in PEFT.
    """
    if getattr(config, "target_parameters", None):
        what = "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`."
        raise as_builtin(SurgeryError(what, fix="inject it without the state_dict"))
    modules = Modules.of(model)
    mark = re.compile(rf"\.{_mark_of(config)}")
    texts = (key.removeprefix("_orig_mod.").removeprefix(PREFIX) for key in keys)
    named = {mark.split(text)[0] for text in texts if mark.search(text)} & modules.by_path.keys()
    if not named:
        raise NoMatchingPeftModuleError("the state_dict has no tensors of this method for modules of the model")
    own = chosen_by(config.to_dict(), modules) if getattr(config, "target_modules", None) else set[str]()
    more, fewer = sorted(own - named), sorted(named - own)
    if more or fewer:
        text = "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
        text += "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent. "
        text += f"The PEFT config contained these additional target modules: {more}. " if more else ""
        text += f"The state_dict contained these additional target modules: {fewer}. " if fewer else ""
        warnings.warn(text, PeftRuntimeWarning, stacklevel=4)
    changed: Any = copy.copy(config)
    changed.target_modules = "|".join(map(re.escape, sorted(named)))
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if hasattr(changed, name):
            setattr(changed, name, None)
    return changed


def _mark_of(config: PeftConfig) -> str:
    """What names of PEFT's tensors of a method begin with, such as lora_."""
    method = method_of(config.method)
    names = [*method.marks, *method.tensors.values()]
    return names[0].partition("_")[0] + "_" if names else f"{str(config.method).lower()}_"


def check_targets(config: PeftConfig, model: nn.Module) -> None:
    """Raises PEFT's error where the targets match no module, with the engine's near misses."""
    data = config.to_dict()
    targets, parameters = data.get("target_modules"), data.get("target_parameters")
    modules = Modules.of(model)
    for name in parameters or ():
        if isinstance(name, str) and name in model._parameters:
            what = f"Targeting an nn.Parameter on the top-level module is not supported (parameter {name!r})."
            fix = "put the model into a module, whose child it is; or give its path to a rule: ExpertLoraRule"
            raise as_builtin(SurgeryError(what, fix=fix))
    if parameters and not targets and not any(targeted_parameters(parameters, modules)):
        what = "No `target_modules` passed but also no `target_parameters` found. "
        raise NoMatchingPeftModuleError(f"{what}Please check the values for these arguments.")
    named = method_of(config.method).targeted or config.method == "TRAINABLE_TOKENS"
    if not targets or parameters or not named:
        return
    if chosen_by(data, modules):
        return
    around = [name for name in ("layers_to_transform", "layers_pattern") if data.get(name) is not None]
    note = "".join(f" Note: You specified '{name}': {data[name]}." for name in around)
    left = {name: data[name] for name in ("exclude_modules", "modules_to_save") if data.get(name)}
    kept = select_targets({"target_modules": ".*", **left}, modules.by_path)
    what = (
        "No modules were targeted for adaptation. This might be caused by a combination of mismatched target modules "
        "and excluded modules."
    )
    if not kept:
        what = "All modules were excluded. This is likely unintended."
    elif len(kept) == len(modules.by_path):
        what = f"Target modules {config.target_modules} not found in the base model."  # type: ignore[attr-defined]
        what = f"{what} Please check the target modules and try again."
    raise NoMatchingPeftModuleError(f"{what}{note}", why=_near(config, model))


def targeted_parameters(targets: Any, modules: Modules) -> Iterator[str]:
    """The names of the parameters that `target_parameters` mean."""
    for path, names in modules.parameters_of(targets or ()).items():
        yield from (f"{path}.{name}" for name in names)


def _near(config: PeftConfig, model: nn.Module) -> str | None:
    """What the engine says of the same targets: its nearest misses."""
    try:
        for rule in rules_by(model, config.to_dict()):
            matches(Tree.of(model), rule)
    except MatchError as error:
        return error.why
    except SurgeryError as error:
        return str(error)
    return None
