"""PEFT's folder of adapters, as `PeftModel.save_pretrained` writes it, and what a Trainer resumes from beside it."""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from surgery.checkpoint import put_peft, save_adapter
from surgery.errors import SurgeryError, SurgeryWarning
from surgery.fingerprint import fingerprint
from surgery.peft_format import SILENT
from surgery.peft_writing import written
from surgery.spelling import class_of
from surgery.state import adapter_names, is_adapter_key, require_state, whole

__all__ = ["push", "save"]

CHECKPOINT = re.compile(r"checkpoint-\d+")


def save(
    facade: Any, folder: str | Path, names: Sequence[str] | None, writes: bool, state: Mapping[str, Tensor] | None
) -> None:
    base, folder = facade.get_base_model(), Path(folder)
    if folder.is_file():
        raise SurgeryError(f"{folder} is no folder", fix="an adapter is saved into a folder of its own")
    chosen = list(facade.peft_config) if names is None else adapter_names(require_state(base), list(names))
    if not chosen:
        raise SurgeryError("there is no adapter to save", fix="the model itself: get_base_model().save_pretrained(…)")
    found = {name: _written(base, name, state) for name in chosen}  # all of them, before any is in a file
    extra = {"base": fingerprint(base), "licence": None, "metadata": {}}
    kept = _trained(base, state) if CHECKPOINT.fullmatch(folder.resolve().name) else None
    if not writes:
        return
    for name, (config, tensors) in found.items():
        place = folder if name == "default" else folder / name
        place.mkdir(parents=True, exist_ok=True)
        given = facade.peft_config.get(name)
        if tensors is not None:
            put_peft(place, _said(base, given, config), tensors, extra)
            continue
        save_adapter(base, place, name, format="surgery")
        if given is not None:
            given = copy.copy(given)
            given.inference_mode = True
            given.save_pretrained(place)  # PEFT finds no tensors beside it
    if kept is not None:
        from safetensors.torch import save_file

        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _written(
    model: Any, name: str, state: Mapping[str, Tensor] | None
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """PEFT's form of an adapter; without tensors where it has none that is the same adapter."""
    try:
        return written(model, name, state=state)
    except SurgeryError as error:
        why = f"{error.what}: {error.why}; it is written in a format of its own"
        warnings.warn(why, SurgeryWarning, stacklevel=4)
        return {}, None


def push(facade: Any, repo_id: str, *, message: str | None, **options: Any) -> str:
    from surgery.hub import card_of, upload

    with tempfile.TemporaryDirectory() as place:
        facade.save_pretrained(place)
        adapter = next(iter(facade.peft_config))
        card = card_of(facade.get_base_model(), adapter, repo_id, peft=True, metadata=None, licence=None)
        (Path(place) / "README.md").write_text(card, encoding="utf-8")
        return upload(place, repo_id, message=message or "Upload of adapters", **options)


def _said(model: Any, given: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration: what the adapter is by its rules, the rest by the one it came with."""
    own = {} if given is None else given.to_dict()
    told = {name: value for name, value in own.items() if name in SILENT and value is not None}
    said = {**own, **config, **told, "inference_mode": True}
    if said.get("task_type") is None:  # by which PEFT finds the base's class
        said["auto_mapping"] = {
            "base_model_class": class_of(model).__name__,
            "parent_library": class_of(model).__module__,
        }
    if said.get("peft_version", "") is None:  # PEFT takes an absent one for an old one, and fails on null
        del said["peft_version"]
    return said


def _trained(model: Any, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """All tensors but the base's frozen parameters: what training changes."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    held = model.state_dict() if state is None else state
    return {
        name: whole(tensor.detach()).cpu().contiguous().clone()
        for name, tensor in held.items()
        if name not in frozen or is_adapter_key(model, name)
    }
