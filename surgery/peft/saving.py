"""Writes a façade's adapters into PEFT's folder, with a model card."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import surgery
from surgery.adapter_files.entry import OLD, PEFT
from surgery.errors import SurgeryError, SurgeryWarning, near_misses
from surgery.peft.checkpoints import write_checkpoint
from surgery.peft.delegation import Facade
from surgery.peft.errors import as_builtin
from surgery.peft.model_card import write_card
from surgery.peft.notices import warn_of_embeddings
from surgery.rewritten_model.verb_root import rewritten
from surgery.state.adapter_naming import adapter_names
from surgery.storage.checkpoint_folder import is_checkpoint

__all__ = ["save_folder"]


def save_folder(
    facade: Facade,
    folder: Path,
    safe_serialization: bool = True,
    selected_adapters: Any = None,
    save_embedding_layers: Any = "auto",
    is_main_process: bool = True,
    path_initial_model_for_weight_conversion: str | None = None,
    state_dict: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Write the adapters of a façade as `PeftModel.save_pretrained` describes."""
    model, configs = facade._base, facade._configs
    if folder.is_file():
        raise as_builtin(SurgeryError(f"Provided path ({folder}) should be a directory, not a file"))
    if path_initial_model_for_weight_conversion is not None:
        why = "an adapter that changed the base's weights can't be converted here into one that does not"
        fix = "save it as it is; load_adapter changes the base's weights again"
        what = "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported"
        raise as_builtin(SurgeryError(what, why=why, fix=fix))
    unknown = sorted({*(selected_adapters or ())} - configs.keys())
    if unknown:
        there = f"current supported adapter names are {list(configs)} - got {list(selected_adapters)}"
        what = f"You passed an invalid `selected_adapters` arguments, {there}."
        raise as_builtin(SurgeryError(what, why=near_misses(unknown[0], configs)))
    if not is_main_process:
        return
    tensors = state_dict or model.state_dict()
    if (folder / OLD).is_dir():  # of `write_checkpoint`
        (folder / OLD).rmdir()
    for name in adapter_names(rewritten(model)[1], selected_adapters):
        place, config = folder if name == "default" else folder / name, configs.get(name)
        arguments: dict[str, Any] = {"config": config and config.to_dict(), "state_dict": tensors}
        arguments["save_embedding_layers"] = save_embedding_layers
        if config is not None:
            warn_of_embeddings(config.to_dict(), model, save_embedding_layers)
        try:
            surgery.save_adapter(model, place, name, format="peft", **arguments)
            if not safe_serialization:
                _pickle_tensors(place)
        except SurgeryError as error:
            why = f"{error.what}: {error.why}; it is written in a format of its own"
            warnings.warn(why, SurgeryWarning, stacklevel=4)
            surgery.save_adapter(model, place, name, format="surgery", **arguments)
            if config is not None:  # PEFT finds no tensors beside it
                config.save_pretrained(place)
    write_card(facade, folder)
    if is_checkpoint(folder):
        write_checkpoint(facade, folder, tensors)


def _pickle_tensors(folder: Path) -> None:
    """Replace the adapter's safetensors file by a file of `torch.save`, as `safe_serialization=False` asks."""
    tensors = load_file(folder / PEFT[0])
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
        torch.save(tensors, file)
    os.chmod(file.name, (folder / PEFT[0]).stat().st_mode)
    os.replace(file.name, folder / OLD)
    (folder / PEFT[0]).unlink()
