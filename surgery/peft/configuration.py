"""A configuration on its way onto a model: whether its targets match, and the object that the façade keeps."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn

from surgery.errors import MatchError, SurgeryError
from surgery.patterns.paths import select_targets
from surgery.peft.base_config import PeftConfig, own_class
from surgery.peft.errors import NoMatchingPeftModuleError
from surgery.peft_format.methods import method_of, rules_by
from surgery.peft_format.targets import Modules, chosen_by
from surgery.planning.matching import Tree, matches

__all__ = ["check_targets", "completed"]


def completed(config: Any, resolved: PeftConfig) -> PeftConfig:
    """The user's configuration with the fields that were filled in; one of PEFT's own as ours.

    PEFT keeps the object that it is given, too, so that code may look at it or change it afterwards.
    """
    if own_class(type(config)) is not type(resolved):
        return resolved
    for field in fields(resolved):
        setattr(config, field.name, getattr(resolved, field.name))
    return config


def check_targets(config: PeftConfig, model: nn.Module) -> None:
    """Raises PEFT's error where the targets match no module, with the engine's near misses."""
    data = config.to_dict()
    targets = data.get("target_modules")
    if not targets or data.get("target_parameters") or not method_of(config.method).targeted:
        return
    modules = Modules.of(model)
    if chosen_by(data, modules):
        return
    around = [name for name in ("layers_to_transform", "layers_pattern") if data.get(name) is not None]
    note = "".join(f" Note: You specified '{name}': {data[name]}." for name in around)
    left = {name: data[name] for name in ("exclude_modules", "modules_to_save") if data.get(name)}
    kept = select_targets({"target_modules": ".*", **left}, modules.by_path)
    what = "No modules were targeted for adaptation."
    if not kept:
        what = "All modules were excluded. This is likely unintended."
    elif len(kept) == len(modules.by_path):
        what = f"Target modules {config.target_modules} not found in the base model."  # type: ignore[attr-defined]
        what = f"{what} Please check the target modules and try again."
    raise NoMatchingPeftModuleError(f"{what}{note}", why=_near(config, model))


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
