"""A Trainer's checkpoints of a façade: written with all that was trained, and put back as a whole."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import surgery
from surgery.adapter_files.entry import OLD, PEFT
from surgery.errors import RuleError, SurgeryWarning
from surgery.patterns.module_walk import RESERVED
from surgery.patterns.wrappers import plain_name, unwrap
from surgery.peft.delegation import Facade
from surgery.rewritten_model.save_pretrained import adapter_keys
from surgery.sharded_tensors import copy_into
from surgery.state.records import merged_adapters
from surgery.storage.checkpoint_folder import is_checkpoint, trained_file, write_trained
from surgery.transaction.undo_log import Journal

__all__ = ["load_checkpoint", "subfolder_of", "write_checkpoint"]


def write_checkpoint(facade: Facade, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` with all that was trained, beside the adapters in a Trainer's checkpoint.

    With `load_best_model_at_end` the Trainer calls `load_adapter` if a file of PEFT lies in the folder itself. Where
    all adapters are in subfolders, or in a format of their own, an empty folder has the name of such a file.
    """
    rules = {name: _rules(facade._base, name) for name in facade._configs}
    write_trained(facade._base, folder, tensors, rules=json.dumps(rules))
    if not any((folder / name).exists() for name in (PEFT[0], OLD)):
        (folder / OLD).mkdir()


def load_checkpoint(facade: Any, source: Any, adapter_name: str) -> bool:
    """Put back what a checkpoint of the façade's adapters holds: the active adapters, and the base's trained tensors.

    The Trainer asks for the first active adapter alone, which would leave the others, and the base, as they are at the
    end of the training.

    Returns:
        False, with the model unchanged, if the source is not a checkpoint of these adapters with these rules.
    """
    model, active = facade._base, facade.active_adapters
    file = trained_file(Path(source)) if is_checkpoint(Path(source)) else None
    if file is None or adapter_name not in active or merged_adapters(unwrap(model)):
        return False
    rules = json.loads(file.metadata.get("rules", "{}"))
    if any(rules.get(name) is None or rules[name] != _rules(model, name) for name in active):
        return False
    state = {plain_name(key): (key, value) for key, value in model.state_dict(keep_vars=True).items()}
    trained = {plain_name(key) for key in adapter_keys(model, active)}
    others = {plain_name(key) for key in adapter_keys(model)} - trained
    keys = {name: key for key in file.shapes if (name := plain_name(key)) not in others}
    keys = {name: key for name, key in keys.items() if not _of_absent(name, rules, facade)}
    if not trained <= keys.keys() or any(
        name not in state or tuple(state[name][1].shape) != file.shapes[key] for name, key in keys.items()
    ):
        return False
    with Journal() as journal:
        for name in keys:
            journal.undo(copy_into, state[name][1], state[name][1].detach().clone())
        model.load_state_dict({state[name][0]: file.read(key) for name, key in keys.items()}, strict=False)
    if len(active) > 1:
        rest = ", ".join(repr(name) for name in active if name != adapter_name)
        text = f"{source} holds the adapters that were trained together: beside {adapter_name!r} it brings back {rest}"
        warnings.warn(text, SurgeryWarning, stacklevel=5)
    return True


def subfolder_of(source: Any, adapter_name: str) -> str | None:
    """The subfolder of an adapter in a Trainer's checkpoint, which PEFT passes over; None if it does not exist."""
    place = Path(source)
    exists = is_checkpoint(place) and adapter_name != "default" and (place / adapter_name / PEFT[1]).is_file()
    return adapter_name if exists else None


def _rules(model: Any, name: str) -> list[Any] | None:
    """The rules of an adapter as JSON data; None if they can't be written as data."""
    try:
        return json.loads(json.dumps([rule.to_dict() for rule in surgery.rules_of(model, name)]))
    except (RuleError, TypeError):
        return None


def _of_absent(name: str, rules: Mapping[str, Any], facade: Any) -> bool:
    """Whether a tensor belongs to an adapter that the façade does not have any more."""
    return any(f".{RESERVED}.{adapter}." in f".{name}" for adapter in rules if adapter not in facade._configs)
