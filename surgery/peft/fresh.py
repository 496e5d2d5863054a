"""PEFT's format without files: rules by a configuration, and tensors by PEFT's keys into an adapter that is there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.base_rule import Rule
from surgery.errors import LoadError, PlanError, SurgeryError, SurgeryWarning
from surgery.files import open_tensors
from surgery.peft_format import PeftConfig, asked_for, method_of
from surgery.peft_keys import keys_of
from surgery.peft_writing import described
from surgery.state import adapter_state_dict, load_adapter_state_dict
from surgery.stored import SURGERY, names_in

__all__ = ["fill", "refill", "rules_for"]


def rules_for(model: nn.Module, config: Mapping[str, Any]) -> list[Rule]:
    """The rules of a new adapter by PEFT's configuration. `PlanError` with everything that can't be held."""
    given = PeftConfig(config, model)
    rules, problems, unheld = asked_for(given, method_of(config.get("peft_type")).start)
    if problems or unheld:
        raise PlanError([*problems, *unheld])
    for note in given.notes:
        warnings.warn(note, SurgeryWarning, stacklevel=3)
    return rules


def fill(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Copy tensors under PEFT's keys into an adapter: which are missing, and which are none of its. All or nothing."""
    found, live = described(model, adapter, exact=True), adapter_state_dict(model, adapter)
    values, missing, used, problems = list[tuple[Tensor, Tensor]](), list[str](), set[str](), list[SurgeryError]()
    for name, key, entry in found.entries(live):
        own = live[name]  # shares the model's memory
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
    passed_over = found.method.passed_over or ("\n",)
    return list(dict.fromkeys(missing)), [k for k in tensors if k not in used and not k.endswith(passed_over)]


def refill(
    model: nn.Module, adapter: str, source: str | Path, subfolder: str | None, revision: str | None
) -> tuple[list[str], list[str]]:
    """The tensors of a folder or repository into an adapter that is there: which are missing, which none of its."""
    place = Path(source)
    if not place.exists():
        from surgery.hub import fetched

        place = fetched(str(source), subfolder, revision)
    elif subfolder:
        place = place / subfolder
    names = names_in(place)
    if names is None:
        raise SurgeryError("there is no adapter in this folder", where=str(place))
    file = open_tensors(place / names[0])
    if names[0] == SURGERY[0]:
        load_adapter_state_dict(model, {key: file.read(key) for key in file.shapes}, adapter)
        return [], []
    return fill(model, adapter, {key: file.read(name) for key, name in keys_of(model, file).items()})
