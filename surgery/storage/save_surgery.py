"""`save_surgery`: writes the rules of all live adapters of a model in their order, and their tensors."""

from __future__ import annotations

import contextlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.adapter_files.entry import MODEL, MODEL_NAME, VERSION
from surgery.adapter_files.process_group import writing
from surgery.adapter_files.tensor_files import replace_files, write_safetensors
from surgery.authoring.rule_names import check_named
from surgery.errors import SurgeryError, abbreviate
from surgery.progress import Progress
from surgery.rewritten_model.restructure import set_aside_sites, structure_undone
from surgery.rewritten_model.state_dict import adapter_state_dict
from surgery.rewritten_model.verb_root import records_in, rewritten
from surgery.state.absent_values import without_values
from surgery.state.adapter_tensors import tensors_of, whole
from surgery.state.fingerprint import brief_fingerprint
from surgery.state.records import ModelState, sites
from surgery.storage.path_check import check_targets
from surgery.transaction.created_folder import created_folder
from surgery.transaction.neutral_context import neutrally

__all__ = ["save_surgery", "surgery_tensors"]


@neutrally()
def save_surgery(model: nn.Module, folder: str | Path, *, progress: Progress = False) -> Path:
    """Write what was done to a model: the rules of all its adapters in their order, and their tensors.

    >>> import tempfile
    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, load_surgery, remove, save_surgery
    >>> from surgery.rules import DropRule, ReplaceRule
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU())
    >>> _ = apply_rules(model, [DropRule("2"), ReplaceRule("1", by="torch.nn.GELU")])
    >>> changed = model(torch.ones(1, 4))
    >>> folder = save_surgery(model, tempfile.mkdtemp())
    >>> [file.name for file in folder.iterdir()]
    ['surgery.json']
    >>> other = load_surgery(remove(model), folder, trust=True)
    >>> torch.equal(other(torch.ones(1, 4)), changed)
    True

    For models that no plain class can hold: `merge_to` refuses them. `load_surgery` puts everything on the base again.
    The base is not written. `surgery.json` has the rules, and a few numbers of the base, by which `load_surgery` tells
    another base. `surgery.safetensors` has the tensors of adapters, also those on layers that structural rules took
    out; without tensors it is not written.

    Args:
        model: the model. A merged adapter is saved as it was trained.
        folder: the folder; it is created if it is absent, and its other files stay.
        progress: as in `apply_rules`; a step is a tensor. Default False.

    Returns:
        The folder's path.

    Raises:
        SurgeryError: a rule holds something that is not data, or its class lacks `@rule`; an adapter's rules no longer
            match its modules; its tensors have no values yet; or part of the model was rewritten separately.

    Notes:
        If the process is killed, the folder holds the previous files or the new ones. If processes share a sharded
        model, all of them call this function, and the first one writes.
    """
    root, state = rewritten(model)
    if inner := records_in(root, below=True):
        raise SurgeryError(
            "part of this model has rules of its own",
            where=abbreviate(inner, "parts"),
            why="it was rewritten separately",
            fix="save_surgery(part, folder) for each of these parts",
        )
    all_sites = list(sites(root))
    for name, rules in state.adapters.items():
        for rule in rules:
            check_named(type(rule))
        if not _restructured_since(state, name):
            check_targets(root, state, all_sites, name)
        if any(map(without_values, state.places[name].boxes)):
            why = "its tensors came from the meta device by to_empty"
            raise SurgeryError(f"the adapter {name!r} has no values yet", why=why, fix="load them first")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise SurgeryError(f"{folder} is not a folder", fix="a surgery is saved into a folder")
    with structure_undone(state.structure):
        base = brief_fingerprint(root)
    tensors = {key: whole(tensor) for key, tensor in surgery_tensors(root, state).items()}
    settings = {
        "format": MODEL_NAME,
        "version": VERSION,
        "base": base,
        "adapters": [_described(state, name) for name in state.adapters],
        "tensors": bool(tensors),
    }
    with writing(Path(folder), tensors) as writes:
        if writes:
            _write(Path(folder), tensors, settings, progress)
    return Path(folder)


def surgery_tensors(root: nn.Module, state: ModelState) -> dict[str, Tensor]:
    """The tensors of all adapters, by the adapter's number and their present names, or their number while set aside."""
    tensors: dict[str, Tensor] = {}
    aside = set_aside_sites(root, state)
    for number, name in enumerate(state.adapters):
        tensors |= {f"{number}.{key}": tensor for key, tensor in adapter_state_dict(root, name).items()}
        for index, module in enumerate(aside):
            for key, tensor in tensors_of(module, name).items():
                tensors[f"{number}.set_aside.{index}.{key}"] = tensor.detach()
    return tensors


def _described(state: ModelState, name: str) -> dict[str, Any]:
    standing = state.standing[name]
    described = {
        "name": name,
        "rules": [rule.to_dict() for rule in state.adapters[name]],
        "sites": len(state.places[name].modules),
        "live": standing.live,
        "weight": standing.weight,
        "freezes": standing.freezes,
    }
    fields = state.peft_fields.get(name)
    return {**described, "peft": fields} if fields else described


def _restructured_since(state: ModelState, name: str) -> bool:
    """Whether an adapter after this one has structural rules, so that its rules match modules of the time before."""
    order = list(state.adapters)
    later = order[order.index(name) + 1 :]
    return any(record.adapter in later for record in state.structure)


def _write(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any], progress: Progress) -> None:
    text = (json.dumps(settings, indent=1) + "\n").encode()
    if tensors:
        metadata = {"format": "pt", "surgery": json.dumps({"settings": settings})}
        writer = partial(write_safetensors, tensors=tensors, metadata=metadata, progress=progress)
        replace_files(folder, (MODEL[0], writer), (MODEL[1], text))
        return
    with created_folder(folder):
        temporary = folder / f".surgery-{os.urandom(6).hex()}-{MODEL[1]}"
        try:
            with open(temporary, "xb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / MODEL[1])
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
        with contextlib.suppress(FileNotFoundError):
            (folder / MODEL[0]).unlink()
