"""Writes folders of adapters without their base, for `AdapterCheckpoints`, `save_pretrained` and a Trainer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.adapter_files.tensor_files import TensorFile, open_tensors
from surgery.errors import SurgeryError, SurgeryWarning
from surgery.patterns.module_walk import base_modules
from surgery.patterns.wrappers import plain_name
from surgery.rewritten_model.save_pretrained import adapter_keys, structure_names, trained_tensor_names
from surgery.state.adapter_tensors import first_process, whole
from surgery.state.records import base_parameters, require_state
from surgery.storage.hub_upload import card_of, upload
from surgery.storage.save import later_structure, save_adapter
from surgery.storage.save_surgery import save_surgery

__all__ = ["is_checkpoint", "save_folder", "save_trained", "trained_file", "write_adapters", "write_trained"]

_TRAINED = "model.safetensors"  # the name from which a Trainer resumes
_MARK = "trained tensors"


def write_adapters(model: nn.Module, folder: Path, names: list[str], configs: Mapping[str, Any]) -> None:
    """Writes adapters with the arguments of `save_pretrained`. Serves as `ModelState.adapter_writer`."""
    tensors, main = configs.get("state_dict"), configs.get("is_main_process", True)
    if tensors is not None and not tensors:
        warnings.warn(
            f"no adapter is written to {folder}: the state dict is empty (ZeRO 3 without "
            "stage3_gather_16bit_weights_on_model_save); gather the weights, then save_adapter(…, state_dict=…)",
            SurgeryWarning,
            stacklevel=3,
        )
        return
    state = model.state_dict() if tensors is None else tensors
    alone = tensors is not None or not any(hasattr(t, "full_tensor") for t in state.values())
    if not main and alone:
        return
    checkpoint = is_checkpoint(folder)
    save_folder(model, folder, names, state if alone else None, trained=checkpoint)
    if main:
        written = {*structure_names(model)}
        base = [] if checkpoint else base_parameters(model)
        rest = [name for name, parameter in base if parameter.requires_grad and name not in written]
        _warn_of_unsaved(folder, rest + _keys_outside(model, tensors or ()))
    if configs.get("push_to_hub") and main:
        repo = str(configs.get("repo_id") or folder.name)
        options = {key: configs[key] for key in ("private", "token", "revision") if key in configs}
        upload(folder, repo, card_of(model, names[0], repo, peft=True), configs.get("commit_message") or "Adapters",
               **options)  # fmt: skip


def save_folder(
    model: nn.Module, folder: Path, names: list[str], state_dict: Mapping[str, Tensor] | None, *, trained: bool
) -> None:
    """Writes adapters: a single adapter, or "default", into the folder itself, others into subfolders.

    Adapters that can't be saved alone, because later ones changed the structure, are written as one surgery.

    `trained`: also writes `model.safetensors`, from which a Trainer resumes. Without a state dict, all processes of a
    distributed run must call this function, and the first one writes.
    """
    apart = all(later_structure(require_state(model), name) is None for name in names)
    if not apart:
        save_surgery(model, folder)
    for name in names if apart else ():
        place = folder if name == "default" or len(names) == 1 else folder / name
        save_adapter(model, place, name, state_dict=state_dict)
    if trained:
        save_trained(model, folder, state_dict)
    elif trained_file(folder) is not None:  # the Trainer copied it from a checkpoint before a push
        (folder / _TRAINED).unlink(missing_ok=True)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name that a Trainer gives its checkpoints."""
    return re.fullmatch(r"checkpoint-\d+", folder.resolve().name) is not None


def trained_file(folder: Path) -> TensorFile | None:
    """Opens the file that `save_trained` wrote into a folder; None if the folder does not have this file."""
    try:
        file = open_tensors(folder / _TRAINED) if (folder / _TRAINED).is_file() else None
    except SurgeryError:
        return None
    return file if file is not None and file.metadata.get("surgery") == _MARK else None


def _keys_outside(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """Returns keys of a state dict that no module of the model has.

    Does not call the model's `state_dict`, which may be a collective that the other processes do not join.
    """
    known = {plain_name(path) for path, _ in base_modules(model)} | {plain_name(key) for key in adapter_keys(model)}
    known |= {
        plain_name(name) for name, _ in base_parameters(model)
    }  # quantised weights have further keys, such as weight.absmax
    pairs = ((key, plain_name(key)) for key in keys)
    return [key for key, name in pairs if name not in known and name.rpartition(".")[0] not in known]


def _warn_of_unsaved(folder: Path, rest: list[str]) -> None:
    """Warns of trained tensors outside adapters, and of keys outside the model: they are not saved."""
    if rest:
        listed = ", ".join(rest[:3]) + (", …" if len(rest) > 3 else "")
        warnings.warn(
            f"{len(rest)} trained tensors are not in {folder}, because no adapter has them: {listed}. A TrainRule adds "
            "them to an adapter; base_state_dict(model) returns those of the base",
            SurgeryWarning,
            stacklevel=4,
        )


def save_trained(model: nn.Module, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write `model.safetensors` with all that training changes: a model's tensors but the frozen ones of its base.

    >>> import tempfile
    >>> from safetensors.torch import load_file
    >>> from torch import nn
    >>> from surgery.rules import LoraRule
    >>> from surgery import apply_rules
    >>> from surgery.trainer import save_trained
    >>> folder = tempfile.mkdtemp()
    >>> save_trained(apply_rules(nn.Sequential(nn.Linear(4, 4)), LoraRule("0", rank=2)), folder)
    >>> sorted(load_file(f"{folder}/model.safetensors"))
    ['0.adapters.default.A', '0.adapters.default.B']

    For checkpoints without the base: `load_state_dict(…, strict=False)` puts it back. Weights that an adapter changed
    at its start (PiSSA) are written, too. `state_dict`: the model's, where it was gathered from elsewhere.
    """
    write_trained(model, folder, state_dict)


def write_trained(
    model: nn.Module, folder: str | Path, state_dict: Mapping[str, Tensor] | None, **metadata: str
) -> None:
    """Writes the file of `save_trained`, with further metadata."""
    from safetensors.torch import save

    state = model.state_dict() if state_dict is None else state_dict
    trained_names = trained_tensor_names(model)
    chosen = {
        key: t
        for key, t in state.items()
        if plain_name(key) in trained_names or plain_name(key).endswith("_extra_state")
    }
    tensors = {key: whole(t.detach()).cpu().contiguous().clone() for key, t in chosen.items() if isinstance(t, Tensor)}
    if state_dict is not None or first_process():
        data = save(tensors, metadata={**metadata, "format": "pt", "surgery": _MARK})
        (Path(folder) / _TRAINED).write_bytes(data)  # save_file would create a file that only its owner may read
