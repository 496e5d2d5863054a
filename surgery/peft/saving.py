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
from surgery.peft.notices import warn_of_embeddings
from surgery.rewritten_model.verb_root import rewritten
from surgery.state.adapter_naming import adapter_names
from surgery.storage.checkpoint_folder import is_checkpoint
from surgery.storage.hub_upload import card_of

__all__ = ["save_folder", "write_card"]


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


def write_card(facade: Any, folder: Path) -> None:
    """Write the model card of a façade's adapters, or complete the metadata of the card that is there."""
    model, place = facade._base, folder / "README.md"
    text = (
        place.read_text(encoding="utf-8") if place.exists() else card_of(model, _first(facade), folder.name, peft=True)
    )
    head, body = _head_of(text)
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    told = {"library_name": "peft", **({"base_model": base} if base else {})}
    if facade._task == "CAUSAL_LM" and not any(line.startswith("pipeline_tag:") for line in head):
        told["pipeline_tag"] = "text-generation"
    tags = [line.removeprefix("- ").strip() for line in _block(head, "tags")]
    tags += [*(getattr(model, "model_tags", None) or ()), *_tags(facade, base)]
    head = [line for line in _without(head, "tags") if line.partition(":")[0] not in told]
    head += [f"{key}: {value}" for key, value in told.items()]
    head += ["tags:", *(f"- {tag}" for tag in dict.fromkeys(tags))] if tags else []
    folder.mkdir(parents=True, exist_ok=True)
    place.write_text("\n".join(["---", *head, "---", *body]) + "\n", encoding="utf-8")


def _first(facade: Any) -> str:
    return next(iter(facade.active_adapters or facade._configs))


def _tags(facade: Any, base: str | None) -> list[str]:
    """The tags by which the hub finds an adapter, as PEFT gives them."""
    tags = ["lora"] if any(config.method == "LORA" for config in facade._configs.values()) else []
    tags += ["transformers"] if hasattr(facade._base, "prepare_inputs_for_generation") or base is not None else []
    return tags + ([f"base_model:adapter:{base}"] if base else [])


def _head_of(text: str) -> tuple[list[str], list[str]]:
    """The lines of a card's metadata, and the lines after it."""
    lines = text.splitlines()
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return [], ["", *lines]
    end = lines.index("---", 1)
    return lines[1:end], lines[end + 1 :]


def _block(head: list[str], name: str) -> list[str]:
    """The items of a list in the metadata."""
    start = next((i for i, line in enumerate(head) if line.startswith(f"{name}:")), None)
    if start is None:
        return []
    inline = head[start].partition(":")[2].strip().strip("[]")
    if inline:
        return [f"- {item.strip()}" for item in inline.split(",")]
    items = list[str]()
    for line in head[start + 1 :]:
        if not line.lstrip().startswith("- "):
            break
        items.append(line.lstrip())
    return items


def _without(head: list[str], name: str) -> list[str]:
    """The metadata without one list."""
    kept, inside = list[str](), False
    for line in head:
        inside = line.startswith(f"{name}:") or (inside and line.lstrip().startswith("- "))
        if not inside:
            kept.append(line)
    return kept
