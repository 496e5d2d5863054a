"""What transformers' own code expects of a model that carries adapters. Works by attributes; imports nothing of it.

- `save_pretrained` writes the base alone: `_keys_to_ignore_on_save` lists the adapters' tensors; and it says so, or
  writes the adapters instead (`surgery.transformers_hooks.save_pretrained`).
- Reentrant gradient checkpointing needs an input that requires gradients, and a frozen embedding gives none.
  transformers asks for them itself where the input is token ids, but not for images and sound (ViT, Whisper): a hook
  on the input embeddings does so while checkpointing is on (PEFT's enable_input_require_grads).
- `resize_token_embeddings` makes the embedding and the head anew: adapters on them grow along
  (`surgery.transformers_hooks.resized_embeddings`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from surgery.patterns.module_walk import base_modules
from surgery.patterns.wrappers import submodule
from surgery.state.records import AdapterWriter, ModelState
from surgery.state.site_links import there
from surgery.transaction.undo_log import Journal
from surgery.transformers_hooks.resized_embeddings import follow_resizing, leave_resizing
from surgery.transformers_hooks.save_pretrained import adapter_keys, forgive_missing, give_back, take_over

__all__ = ["ignore_on_save", "keys_of", "list_on_save", "prepare", "restore", "save_adapters_alone", "unlist"]

_IGNORED = "_keys_to_ignore_on_save"


def prepare(model: nn.Module, state: ModelState, adapter: str, journal: Journal) -> None:
    """After an adapter came: leave it out of `save_pretrained`, and keep reentrant checkpointing trainable."""
    if not state.ignored_on_save:
        state.ignored_on_save = [(path, module.__dict__.get(_IGNORED, _ABSENT)) for path, module in _savers(model)]
        journal.undo(restore_ignored, model, state)
        ignore_on_save(model, state)
    else:
        list_on_save(model, state, adapter, journal)
    for path, _ in state.ignored_on_save:
        if (part := there(model, path)) is not None:
            follow_resizing(part, model, journal)
    for embedding in _embeddings(model, state):
        if not any(isinstance(hook, InputsRequireGrad) for hook in embedding._forward_hooks.values()):
            journal.keep(embedding._forward_hooks)
            embedding.register_forward_hook(InputsRequireGrad(model))


def list_on_save(model: nn.Module, state: ModelState, adapter: str, journal: Journal) -> None:
    """Leave one more adapter out of `save_pretrained`."""
    keys = keys_of(model, state, [adapter])
    journal.undo(unlist, model, state, keys)
    _change(model, state, keys, set.update)


def ignore_on_save(model: nn.Module, state: ModelState) -> None:
    """List the present adapters' tensors beside the keys that the model itself leaves out."""
    for path, original in state.ignored_on_save:
        if (saver := there(model, path)) is None:
            continue
        kept = getattr(type(saver), _IGNORED, None) if original == _ABSENT else original
        setattr(saver, _IGNORED, {*(kept or ()), *adapter_keys(saver), _NEVER_MISSING})
        take_over(saver)


Keys = list[tuple[nn.Module, list[str]]]


def keys_of(model: nn.Module, state: ModelState, adapters: Collection[str]) -> Keys:
    """The keys of these adapters' tensors in each module that lists what `save_pretrained` leaves out."""
    savers = [there(model, path) for path, _ in state.ignored_on_save]
    return [(saver, list(adapter_keys(saver, adapters))) for saver in savers if saver is not None]


def unlist(model: nn.Module, state: ModelState, keys: Keys, journal: Journal | None = None) -> None:
    """Take from the lists what adapters that went had there, and look at no others."""
    if journal is not None:
        journal.undo(_change, model, state, keys, set.update)
    _change(model, state, keys, set.difference_update)


def _change(model: nn.Module, state: ModelState, keys: Keys, change: Callable[[set[str], list[str]], None]) -> None:
    for saver, names in keys:
        listed = saver.__dict__.get(_IGNORED)
        if not isinstance(listed, set) or _NEVER_MISSING not in listed:  # set anew meanwhile
            return ignore_on_save(model, state)
        change(listed, names)


def save_adapters_alone(model: nn.Module, state: ModelState, writer: AdapterWriter) -> None:
    """From now on `save_pretrained` calls `writer`, which writes no base; a state dict without the base is loaded."""
    state.adapter_writer = writer
    if forgive_missing not in model._load_state_dict_post_hooks.values():
        model.register_load_state_dict_post_hook(forgive_missing)


def restore(model: nn.Module, state: ModelState, journal: Journal) -> None:
    """After the last adapter went: attributes and hooks as they were."""
    for path, _ in state.ignored_on_save:
        if (saver := there(model, path)) is not None:
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
    """A forward hook: embeddings of a model under gradient checkpointing start a graph, so adapters get gradients."""

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
        if (saver := there(model, path)) is None:
            continue
        give_back(saver)
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
            found = submodule(model, path).get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(found, nn.Module) and id(found) not in seen:
            seen.add(id(found))
            yield found


_ABSENT = "(no attribute of its own)"
# A Trainer that resumes passes over missing tensors in silence where they are exactly those listed. With one name more
# it warns of the adapters that a checkpoint without `AdapterCheckpoints` does not hold.
_NEVER_MISSING = "(adapters are saved by themselves)"
