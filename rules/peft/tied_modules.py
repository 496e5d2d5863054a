"""The modules that share the weight of a model's input embedding, and PEFT's field `ensure_weight_tying`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from surgery import PeftConfig, SurgeryError

NAMES = ("embed_tokens", "lm_head")  # the names by which PEFT notices that a tied module is adapted


def embedding_path(modules: Any) -> str | None:
    """The path of the model's input embedding."""
    try:
        module = modules.model.get_input_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return next((path for path, other in modules.by_path.items() if other is module), None)


def tied_paths(modules: Any) -> list[str]:
    """The modules that hold the embedding's weight, unless the model's configuration says that nothing is tied."""
    embedding = embedding_path(modules)
    if embedding is None or getattr(getattr(modules.model, "config", None), "tie_word_embeddings", None) is False:
        return []
    return [path for path in paths_with_weight(modules.by_path, modules.by_path[embedding]) if path != embedding]


def paths_with_weight(modules: Mapping[str, nn.Module], module: nn.Module) -> list[str]:
    """The modules that hold the same weight as this one."""
    weight = module._parameters.get("weight")
    return [path for path, other in modules.items() if weight is not None and other._parameters.get("weight") is weight]


def named_embeddings(config: PeftConfig) -> Sequence[str]:
    """The embeddings and heads that the configuration adapts or saves as a whole."""
    saved = config.data.get("modules_to_save") or ()
    return [name for name in (*config.targeted, *saved) if str(name).rpartition(".")[2] in NAMES]


def tied_group(config: PeftConfig, saved: Sequence[str]) -> list[str]:
    """The embedding and its tied modules, where `ensure_weight_tying` asks for one copy of their weight.

    `saved`: the modules that `modules_to_save` means. Empty where the field ties no copies.
    """
    embedding, tied = embedding_path(config.modules), tied_paths(config.modules)
    group = [embedding, *tied] if embedding is not None and tied else []
    # rows of tokens have their own form of it
    asked = config.data.get("ensure_weight_tying") and not config.data.get("trainable_token_indices")
    inside = tuple(f"{path}." for path in saved)
    return group if asked and any(f"{path}.".startswith(inside) for path in group) else []


def targeted_group(config: PeftConfig) -> list[str]:
    """The embedding and its tied modules, where `ensure_weight_tying` asks for LoRA with the same factors on them."""
    asked = config.data.get("ensure_weight_tying") and not config.data.get("trainable_token_indices")
    embedding, tied = embedding_path(config.modules), tied_paths(config.modules)
    group = [embedding, *tied] if asked and embedding is not None and tied else []
    return group if any(path in config.targeted for path in group) else []


def take_tying(config: PeftConfig, saved: Sequence[str]) -> list[str]:
    """Takes `ensure_weight_tying`, but for rows of tokens. Returns the modules that share a copy of their weight."""
    if not config.data.get("ensure_weight_tying") or config.data.get("trainable_token_indices"):
        return []
    config.take("ensure_weight_tying")
    group = tied_group(config, saved)
    targeted = targeted_group(config)
    if targeted and (group or config.data.get("peft_type") != "LORA"):
        why = f"{' and '.join(targeted)} share one copy of their weight, and are targets, too"
        if not group:
            why = f"PEFT has no tied factors of this method for {' and '.join(targeted)}"
        raise config.refuse("ensure_weight_tying", why, "leave the field out: then each target has its own factors")
    for path in group[1:]:
        module = config.modules.by_path[path]
        tensors = [name for name, tensor in (module._parameters | module._buffers).items() if tensor is not None]
        if tensors != ["weight"] or any(module.children()):
            others = ", ".join(name for name in tensors if name != "weight") or "modules inside it"
            why = f"{path} has {others} beside the tied weight, which PEFT leaves out of its copy"
            raise config.refuse("ensure_weight_tying", why, "leave the field out: then each module has its own copy")
    _check_file(config, group)
    return group


def without_tied(names: Iterable[str], tied: Sequence[str]) -> list[str]:
    """Names of `modules_to_save` without those that mean a tied module: PEFT takes them off its list."""
    return [name for name in names if not any(re.match(rf"(^|.*\.){name}($|\..*)", path) for path in tied)]


def weight_key(path: str) -> str:
    return f"base_model.model.{path}.weight"


def _check_file(config: PeftConfig, group: Sequence[str]) -> None:
    """Raises where the file has different copies for modules that share one."""
    file = config.file
    keys = [key for path in group if file is not None and (key := weight_key(path)) in file.shapes]
    if file is None or len(keys) < 2:
        return
    first = file.read(keys[0])
    if not all(torch.equal(file.read(key), first) for key in keys[1:]):
        why = "ensure_weight_tying shares one copy between these modules, and the file has different ones"
        raise SurgeryError("the file has two matrices for tied modules", where=" and ".join(keys), why=why)
