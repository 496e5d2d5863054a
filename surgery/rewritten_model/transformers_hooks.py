"""Adjusts a model with adapters to transformers' own code, through attributes and hooks, without importing it.

- `save_pretrained` writes only the base: `_keys_to_ignore_on_save` lists the adapters' tensors. It warns of that, or
  writes the adapters instead (`surgery.rewritten_model.save_pretrained`).
- Reentrant gradient checkpointing needs an input that requires gradients, and the output of a frozen embedding does
  not. transformers handles token ids, but not images and sound (ViT, Whisper). A hook on the input embeddings sets the
  flag while checkpointing is on (PEFT's enable_input_require_grads).
- `resize_token_embeddings` replaces the embedding and the head: adapters on them are resized, too
  (`surgery.rewritten_model.resized_embeddings`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from surgery.patterns.module_walk import base_modules
from surgery.patterns.wrappers import submodule
from surgery.rewritten_model.resized_embeddings import follow_resizing, leave_resizing
from surgery.rewritten_model.save_pretrained import adapter_keys, forgive_missing, restore_saving, wrap_saving
from surgery.state.records import AdapterWriter, ModelState
from surgery.state.site_links import module_at
from surgery.transaction.undo_log import Journal

__all__ = ["ignore_on_save", "keys_of", "list_on_save", "prepare", "restore", "save_adapters_alone", "unlist"]

_IGNORED = "_keys_to_ignore_on_save"


def prepare(model: nn.Module, state: ModelState, adapter: str, journal: Journal) -> None:
    """For a new adapter: exclude it from `save_pretrained`, and make reentrant checkpointing give it gradients."""
    if not state.ignored_on_save:
        state.ignored_on_save = [(path, module.__dict__.get(_IGNORED, _ABSENT)) for path, module in _savers(model)]
        journal.undo(restore_ignored, model, state)
        ignore_on_save(model, state)
    else:
        list_on_save(model, state, adapter, journal)
    for path, _ in state.ignored_on_save:
        if (part := module_at(model, path)) is not None:
            follow_resizing(part, model, journal)
    for embedding in _embeddings(model, state):
        if not any(isinstance(hook, InputsRequireGrad) for hook in embedding._forward_hooks.values()):
            journal.keep(embedding._forward_hooks)
            embedding.register_forward_hook(InputsRequireGrad(model))


def list_on_save(model: nn.Module, state: ModelState, adapter: str, journal: Journal) -> None:
    """Exclude one more adapter from `save_pretrained`."""
    keys = keys_of(model, state, [adapter])
    journal.undo(unlist, model, state, keys)
    _change(model, state, keys, set.update)


def ignore_on_save(model: nn.Module, state: ModelState) -> None:
    """Add the adapters' tensors to the keys that the model itself excludes from `save_pretrained`."""
    for path, original in state.ignored_on_save:
        if (saver := module_at(model, path)) is None:
            continue
        model_keys = getattr(type(saver), _IGNORED, None) if original == _ABSENT else original
        setattr(saver, _IGNORED, {*(model_keys or ()), *adapter_keys(saver), _NEVER_MISSING})
        wrap_saving(saver)


Keys = list[tuple[nn.Module, list[str]]]


def keys_of(model: nn.Module, state: ModelState, adapters: Collection[str]) -> Keys:
    """The keys of these adapters' tensors in each module that has a list of excluded keys."""
    savers = [module_at(model, path) for path, _ in state.ignored_on_save]
    return [(saver, list(adapter_keys(saver, adapters))) for saver in savers if saver is not None]


def unlist(model: nn.Module, state: ModelState, keys: Keys, journal: Journal | None = None) -> None:
    """Remove the keys of removed adapters from the lists; other adapters' keys are not touched."""
    if journal is not None:
        journal.undo(_change, model, state, keys, set.update)
    _change(model, state, keys, set.difference_update)


def _change(model: nn.Module, state: ModelState, keys: Keys, change: Callable[[set[str], list[str]], None]) -> None:
    for saver, names in keys:
        listed = saver.__dict__.get(_IGNORED)
        if not isinstance(listed, set) or _NEVER_MISSING not in listed:  # other code replaced the list
            return ignore_on_save(model, state)
        change(listed, names)


def save_adapters_alone(model: nn.Module, state: ModelState, writer: AdapterWriter) -> None:
    """Make `save_pretrained` call `writer`, which writes only adapters, and accept state dicts without the base."""
    state.adapter_writer = writer
    if forgive_missing not in model._load_state_dict_post_hooks.values():
        model.register_load_state_dict_post_hook(forgive_missing)


def restore(model: nn.Module, state: ModelState, journal: Journal) -> None:
    """After the last adapter is removed: restore attributes and hooks."""
    for path, _ in state.ignored_on_save:
        if (saver := module_at(model, path)) is not None:
            journal.keep(saver.__dict__)
    restore_ignored(model, state)
    for key, hook in list(model._load_state_dict_post_hooks.items()):
        if hook is forgive_missing:
            journal.keep(model._load_state_dict_post_hooks)
            del model._load_state_dict_post_hooks[key]
    for module in model.modules():
        leave_resizing(module, journal)
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, InputsRequireGrad):
                journal.keep(module._forward_hooks)
                del module._forward_hooks[key]


class InputsRequireGrad:
    """A forward hook of embeddings: under gradient checkpointing their outputs require gradients, for the adapters."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
            return
        if isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad:
            if any(part.__dict__.get("gradient_checkpointing") for _, part in base_modules(self.model)):
                output.requires_grad_(True)


def restore_ignored(model: nn.Module, state: ModelState) -> None:
    for path, original in state.ignored_on_save:
        if (saver := module_at(model, path)) is None:
            continue
        restore_saving(saver)
        if original == _ABSENT:
            saver.__dict__.pop(_IGNORED, None)
        else:
            setattr(saver, _IGNORED, original)


def _savers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in base_modules(model):
        if callable(getattr(type(module), "save_pretrained", None)):
            yield path, module


def _embeddings(model: nn.Module, state: ModelState) -> Iterator[nn.Module]:
    seen: set[int] = set()
    for path, _ in state.ignored_on_save:
        try:
            embedding = submodule(model, path).get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(embedding, nn.Module) and id(embedding) not in seen:
            seen.add(id(embedding))
            yield embedding


_ABSENT = "(no attribute of its own)"
# A Trainer that resumes ignores missing tensors if they are exactly those listed. One more name makes it warn of
# adapters that a checkpoint without `AdapterCheckpoints` does not have.
_NEVER_MISSING = "(adapters are saved by themselves)"
