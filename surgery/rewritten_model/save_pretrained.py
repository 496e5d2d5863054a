"""Replaces `model.save_pretrained` while the model has adapters, so that it never skips them silently.

transformers' own method writes only the base (`surgery.rewritten_model.transformers_hooks` lists the excluded keys). A
`Saver`, set as an attribute of the model, wraps it. It warns of adapters that are not in the files, or, for
`AdapterCheckpoints`, calls the model record's `adapter_writer`, which writes adapters instead of the base.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.errors import SurgeryWarning, abbreviate
from surgery.model_edits.shared_copies import separate_copies
from surgery.patterns.module_class import class_of
from surgery.patterns.module_walk import RESERVED, base_modules, every_path, is_adapters
from surgery.patterns.wrappers import inner_of, plain_name
from surgery.state.adapter_tensors import tensors_of
from surgery.state.records import base_parameters, model_state, sites
from surgery.transaction.undo_log import Trial

__all__ = [
    "Saver",
    "adapter_keys",
    "adapters_to_write",
    "forgive_missing",
    "restore_saving",
    "structure_names",
    "trained_tensor_names",
    "unsaved_adapters",
    "plain_saving",
    "wrap_saving",
]

_NAME = "save_pretrained"


class Saver:
    """`save_pretrained` of a model, or a part of a model, with adapters. Copies of the model keep it."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.before = module.__dict__.get(_NAME)  # the method that another library set

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.before if self.before is not None else getattr(type(self.module), _NAME).__get__(self.module)

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(("is_main_process", "state_dict", "push_to_hub"), args, strict=False)) | kwargs
        unsaved = unsaved_adapters(self.module)
        state = model_state(self.module)
        written = adapters_to_write(self.module)
        if written and state is not None and state.adapter_writer is not None:
            return state.adapter_writer(self.module, Path(save_directory), written, arguments)
        if unsaved and arguments.get("is_main_process", True):
            names = ", ".join(repr(name) for name in unsaved)
            lists = hasattr(type(self.module), "_keys_to_ignore_on_save")
            what = "leaves out its adapters" if lists else "writes its adapters where from_pretrained passes them over"
            warnings.warn(
                f"save_pretrained {what}: a model loaded from {save_directory} lacks what {names} learned. "
                "save_adapter(model, folder, adapter) writes an adapter, merge_to(model, folder) a plain model that "
                "holds it; a Trainer with callbacks=[AdapterCheckpoints()] saves adapters; remove(model) first for the "
                "base alone",
                SurgeryWarning,
                stacklevel=2,
            )
        self._warn_of_structure(save_directory, arguments)
        with Trial() as trial:
            if state is not None:
                separate_copies(self.module, [pair for record in state.structure for pair in record.copies], trial)
            return self._save(save_directory, args, kwargs, arguments)

    def _warn_of_structure(self, save_directory: Any, arguments: Mapping[str, Any]) -> None:
        state = model_state(self.module)
        reasons = [reason for record in state.structure for reason in record.unplain] if state is not None else []
        if reasons and arguments.get("is_main_process", True):
            warnings.warn(
                f"from_pretrained of {class_of(self.module).__name__} does not build the model in {save_directory}: "
                f"{abbreviate(list(dict.fromkeys(reasons)))}. save_surgery(model, folder) writes rules and tensors, "
                "which load_surgery(base, folder) reads",
                SurgeryWarning,
                stacklevel=3,
            )

    def _save(self, save_directory: Any, args: tuple, kwargs: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
        state_dict = arguments.get("state_dict")
        if state_dict is None and any(inner_of(inner) is not None for inner in self.module.modules()):
            state_dict = self.module.state_dict()  # with names that are in no list
        elif state_dict is not None:
            state_dict = _with_separate_copies(self.module, state_dict)
        if state_dict is not None:  # transformers would delete the adapters' tensors from the caller's dict
            return self.__wrapped__(
                save_directory, **{**arguments, "state_dict": _without_adapters(self.module, state_dict)}
            )
        return self.__wrapped__(save_directory, *args, **kwargs)


def wrap_saving(module: nn.Module) -> None:
    """Wrap a module's `save_pretrained` in a `Saver`."""
    if not isinstance(module.__dict__.get(_NAME), Saver):
        module.__dict__[_NAME] = Saver(module)


def restore_saving(module: nn.Module) -> None:
    """Restore a module's `save_pretrained`. A method that another library set over the `Saver` stays."""
    saver = module.__dict__.get(_NAME)
    if isinstance(saver, Saver):
        del module.__dict__[_NAME]
        if saver.before is not None:
            module.__dict__[_NAME] = saver.before


def plain_saving(model: Any) -> Callable[..., Any] | None:
    """The model's own `save_pretrained`, which does not warn; None if it does not have this method."""
    method = getattr(model, _NAME, None)
    return method.__wrapped__ if isinstance(method, Saver) else method


def adapter_keys(module: nn.Module, adapters: Collection[str] | None = None) -> Iterator[str]:
    """The keys of adapters' tensors in a module's state dict, for these adapters or all."""
    for path, inner in every_path(module):
        boxes = inner._modules[RESERVED] if RESERVED in inner._modules else None
        if boxes is not None and is_adapters(boxes):
            for adapter in (
                boxes._modules if adapters is None else [name for name in adapters if name in boxes._modules]
            ):
                for name in tensors_of(inner, adapter):
                    yield ".".join(filter(None, (path, RESERVED, adapter, name)))


def unsaved_adapters(module: nn.Module) -> list[str]:
    """The adapters on a module that are not merged."""
    names: dict[str, None] = {}
    for _, _, site in sites(module):
        merged = site.merged.adapters if site.merged is not None else ()
        names |= dict.fromkeys(applied.adapter for applied in site.applied if applied.adapter not in merged)
    return list(names)


def adapters_to_write(module: nn.Module) -> list[str]:
    """The adapters whose files hold what was done to a model: unmerged ones, and those with structural rules."""
    state = model_state(module)
    unsaved = unsaved_adapters(module)
    structural = state.structural if state is not None else []
    if state is None or not structural:
        return unsaved
    return [name for name in state.adapters if name in structural or name in unsaved]


def _with_separate_copies(module: nn.Module, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict in which the copies of layers that share weights have tensors of their own."""
    state = model_state(module)
    copied = {id(copy) for record in state.structure for _, copy in record.copies} if state is not None else set()
    begins = tuple(f"{path}." for path, inner in base_modules(module) if id(inner) in copied)
    return {key: t.clone() if begins and plain_name(key).startswith(begins) else t for key, t in state_dict.items()}


def _without_adapters(module: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    adapter_names = {plain_name(name) for name in adapter_keys(module)}
    return {key: tensor for key, tensor in state_dict.items() if plain_name(key) not in adapter_names}


def trained_tensor_names(model: nn.Module) -> set[str]:
    """The names of all tensors that training may change, without wrappers' segments."""
    return {plain_name(name) for name in _names_of_trained(model)}


def _names_of_trained(model: nn.Module) -> Iterator[str]:
    yield from adapter_keys(model)
    yield from (name for name, parameter in base_parameters(model) if parameter.requires_grad)
    for path, module in base_modules(model):
        yield from (f"{path}.{name}" if path else name for name in module._buffers.keys())
    yield from structure_names(model)
    for path, _, site in sites(model):
        for applied in site.applied:
            yield from (f"{path}.{name}" if path else name for name, _ in applied.changed)


def structure_names(model: nn.Module) -> Iterator[str]:
    """The tensors that structural rules made: their values are not those of the base."""
    state = model_state(model)
    made = [tensor for record in state.structure for tensor in record.tensors] if state is not None else []
    paths = {id(module): path for path, module in base_modules(model)} if made else {}
    for tensor in made:
        if id(tensor.owner) in paths:
            yield ".".join(filter(None, (paths[id(tensor.owner)], tensor.name)))


def forgive_missing(model: nn.Module, incompatible: Any) -> None:
    """A `load_state_dict` hook: does not report the frozen base as missing if the state dict has none of it.

    Tensors that train, and adapters' tensors, are reported as before.
    """
    missing = {plain_name(name) for name in incompatible.missing_keys}
    trained_names = trained_tensor_names(model)
    frozen = {plain_name(name) for name, _ in base_parameters(model)} - trained_names
    if frozen and frozen <= missing:
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if plain_name(name) in trained_names]
