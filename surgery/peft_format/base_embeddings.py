"""The base's embeddings in PEFT's files: when PEFT writes them, and under which keys."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from surgery.patterns.embeddings import embeddings_of
from surgery.patterns.own_entries import own_parameter
from surgery.patterns.paths import endings, select_targets
from surgery.peft_format.key_history import PREFIX
from surgery.peft_format.targets import Modules
from surgery.state.base_tensors import base_tensor

__all__ = ["Save", "embedding_notes", "embedding_tensors"]

Save = bool | Literal["auto"]
_INSIDE = ("", "base_layer.", "token_adapter.base_layer.", "token_adapter.base_layer.base_layer.")
NAMES = ("embed_tokens", "lm_head")  # those that PEFT looks for


def embedding_tensors(
    config: Mapping[str, Any],
    modules: Modules,
    main: Collection[str],
    file_tensors: Mapping[str, Tensor],
    save: Save,
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a model's embeddings and head by PEFT's keys, where `save_embedding_layers` wants them.

    "auto": where the configuration names one of them as a target, or the model's vocabulary is not the one that its
    name says. `main`: the paths that the method is on; `written`: what else is in the file, rows of the base among it.
    """
    targeted = _targeted(config, modules.by_path)
    if not _wanted(config, modules, save)[0]:
        return {}
    tensors: dict[str, Tensor] = {}
    layers = embeddings_of(modules.model)
    rows = {id(layer.weight) for layer in layers[:1] if _has_rows(modules, layer, file_tensors)}
    for layer in layers:
        path = next((path for path, module in modules.by_path.items() if module is layer), None)
        if path is None or (targeted and path not in main) or _inside(path, config.get("modules_to_save") or ()):
            continue
        inside = "base_layer." if path in main else ""
        if (
            _has_rows(modules, layer, file_tensors) or id(layer.weight) in rows
        ):  # PEFT ties a head to the embedding's rows
            inside = f"token_adapter.base_layer.{inside}"
        for name in _tensors(layer):
            tensor = _restored(layer, name, modules.by_path, file_tensors)
            tensor = base_tensor(layer, name, path, state) if tensor is None else tensor
            if not tensor.is_meta:
                tensors[f"{PREFIX}{path}.{inside}{name}"] = tensor
    return tensors


def embedding_notes(config: Mapping[str, Any], modules: Modules, save: Save) -> list[str]:
    """PEFT's warnings of `save_embedding_layers`: "auto" saves embeddings, or the model does not tell of any."""
    wanted, note = _wanted(config, modules, save)
    notes = [f"Setting `save_embedding_layers` to `True` as {note}."] if note else []
    if wanted and not hasattr(modules.model, "get_input_embeddings"):
        notes.append("Could not identify embedding layer(s) because the model is not a 🤗 transformers model.")
    return notes


def _wanted(config: Mapping[str, Any], modules: Modules, save: Save) -> tuple[bool, str]:
    """Whether the embeddings are saved, and the reason where "auto" decides so."""
    if save != "auto":
        return bool(save), ""
    rows_alone = config.get("trainable_token_indices") is not None or config.get("token_indices") is not None
    if _targeted(config, modules.by_path) and not rows_alone:
        return True, "embedding layers found in `target_modules`"
    grew = _grew(config, modules.model)
    return grew, "the embedding layer has been resized during finetuning" if grew else ""


def _has_rows(modules: Modules, layer: nn.Module, file_tensors: Mapping[str, Tensor]) -> bool:
    paths = [path for path, module in modules.by_path.items() if module is layer]
    return any(f"{PREFIX}{path}.token_adapter.trainable_tokens_delta" in file_tensors for path in paths)


def _restored(
    layer: nn.Module, name: str, by_path: Mapping[str, nn.Module], file_tensors: Mapping[str, Tensor]
) -> Tensor | None:
    """The tensor as the adapter's file already has it, for this module or a tied one."""
    parameter = own_parameter(layer, name)
    paths = [
        path for path, module in by_path.items() if parameter is not None and own_parameter(module, name) is parameter
    ]
    keys = (f"{PREFIX}{path}.{inside}{name}" for path in paths for inside in _INSIDE)
    return next((file_tensors[key] for key in keys if key in file_tensors), None)


def _targeted(config: Mapping[str, Any], paths: Collection[str]) -> bool:
    """Whether the targets name an embedding, by PEFT's test."""
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        named = [path for path in paths if any(name in endings(path) for name in NAMES)]
        return bool(select_targets({"target_modules": targets}, named))
    return any(name in targets for name in NAMES)


def _grew(config: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether the model's vocabulary differs from that of the base of its name, if that is on this disk."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    name = config.get("base_model_name_or_path")
    if not isinstance(size, int) or not isinstance(name, str) or not name:
        return False
    place: Any = Path(name) / "config.json"
    if not place.is_file():
        place = _cached(name)
    try:
        base_config = json.loads(Path(place).read_text(encoding="utf-8")) if place else {}
    except (OSError, ValueError):
        return False
    there = base_config.get("vocab_size") if isinstance(base_config, dict) else None
    return isinstance(there, int) and there != size


def _cached(name: str) -> str | None:
    try:
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(name, "config.json")
    except Exception:  # a name that no repository can have, or no such package
        return None
    return file if isinstance(file, str) else None


def _tensors(module: nn.Module) -> Iterator[str]:
    """The names of a module's own tensors in a state dict."""
    yield from (name for name, tensor in module._parameters.items() if tensor is not None)
    left_out = module._non_persistent_buffers_set
    yield from (name for name, tensor in module._buffers.items() if tensor is not None and name not in left_out)


def _inside(path: str, outer: Collection[str]) -> bool:
    return any(f"{path}.".startswith(f"{other}.") for other in outer)
