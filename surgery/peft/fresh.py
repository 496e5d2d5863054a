"""PEFT's format without files: rules by a configuration, and tensors by PEFT's keys into an adapter that is there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import LoadError, PlanError, SurgeryError, SurgeryWarning
from surgery.files import open_tensors
from surgery.peft_format import PeftConfig, _configured, _entries, _method, _rules
from surgery.peft_keys import keys_of
from surgery.rule import Rule
from surgery.stored import SURGERY, names_in

__all__ = ["fill", "rules_for", "tensors_in"]


def rules_for(model: nn.Module, config: Mapping[str, Any]) -> list[Rule]:
    """The rules of a new adapter by PEFT's configuration. `PlanError` with everything that can't be held."""
    given = PeftConfig(config, model)
    rules, problems, unheld = _rules(given, _method(config.get("peft_type")).start)
    if problems or unheld:
        raise PlanError([*problems, *unheld])
    for note in given.notes:
        warnings.warn(note, SurgeryWarning, stacklevel=3)
    return rules


def fill(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Copy tensors under PEFT's keys into an adapter: which are missing, and which are none of its. All or nothing."""
    config, placed, modules = _configured(model, adapter)
    values, missing, used, problems = list[tuple[Tensor, Tensor]](), list[str](), set[str](), list[SurgeryError]()
    for _, key, entry, own in _entries(adapter, placed, modules, config):
        if key not in tensors:
            missing.append(key)
            continue
        used.add(key)
        try:
            value = entry.read(tensors[key])
        except Exception as error:  # a reshaping of a shape that it did not expect
            problems.append(SurgeryError(f"{key} can't be taken over", why=f"{type(error).__name__}: {error}"[:300]))
            continue
        if value.shape != own.shape:
            why = f"it is {tuple(tensors[key].shape)}, which does not give the {tuple(own.shape)} of this model"
            problems.append(SurgeryError(f"{key} does not fit", why=why))
        values.append((own, value))
    if problems:
        raise LoadError(problems)
    with torch.no_grad():
        for own, value in values:
            own.copy_(value)
    passed_over = _method(config["peft_type"]).passed_over or ("\n",)
    return list(dict.fromkeys(missing)), [k for k in tensors if k not in used and not k.endswith(passed_over)]


def tensors_in(model: nn.Module, source: str | Path, subfolder: str | None, revision: str | None) -> dict[str, Tensor]:
    """The tensors of an adapter in PEFT's files, under PEFT's keys of today."""
    place = Path(source)
    if not place.exists():
        from surgery.hub import fetched

        place = fetched(str(source), subfolder, revision)
    elif subfolder:
        place = place / subfolder
    names = names_in(place)
    if names is None or names[0] == SURGERY[0]:
        raise SurgeryError("there is no adapter in PEFT's format in this folder", where=str(place))
    file = open_tensors(place / names[0])
    return {key: file.read(name) for key, name in keys_of(model, file).items()}
