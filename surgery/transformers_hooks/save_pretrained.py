"""What `model.save_pretrained` does while the model carries adapters: it never leaves them out without a word.

transformers' own writes the base alone (`surgery.transformers_hooks.hooks` lists what it leaves out). A `Saver` stands
before it, as an attribute of the model: it warns of the adapters that are not in the files, or, for
`AdapterCheckpoints`, calls the `adapter_writer` of the model's record, which writes them instead of the base.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.errors import SurgeryWarning
from surgery.patterns.module_walk import RESERVED, base_modules, every_path, is_adapters
from surgery.patterns.wrappers import inner_of, plain_name
from surgery.state.adapter_tensors import tensors_of
from surgery.state.records import base_parameters, model_state, sites

__all__ = [
    "Saver",
    "adapter_keys",
    "forgive_missing",
    "give_back",
    "kept_names",
    "left_out",
    "plain_saving",
    "take_over",
]

_NAME = "save_pretrained"


class Saver:
    """`save_pretrained` of a model (or of a part of one) while it carries adapters. Copies take it along."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.before = module.__dict__.get(_NAME)  # of another library that set its own

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.before if self.before is not None else getattr(type(self.module), _NAME).__get__(self.module)

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("is_main_process", "state_dict", "push_to_hub"), args, strict=False)) | kwargs
        left = left_out(self.module)
        state = model_state(self.module)
        if left and state is not None and state.adapter_writer is not None:
            return state.adapter_writer(self.module, Path(save_directory), left, given)
        if left and given.get("is_main_process", True):
            names = ", ".join(repr(name) for name in left)
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
        held = given.get("state_dict")
        if held is None and any(inner_of(inner) is not None for inner in self.module.modules()):
            held = self.module.state_dict()  # with names that are in no list
        if held is not None:  # transformers would take the adapters' tensors out of the caller's own dict
            return self.__wrapped__(save_directory, **{**given, "state_dict": _without_adapters(self.module, held)})
        return self.__wrapped__(save_directory, *args, **kwargs)


def take_over(module: nn.Module) -> None:
    """Put a `Saver` before a module's `save_pretrained`."""
    if not isinstance(module.__dict__.get(_NAME), Saver):
        module.__dict__[_NAME] = Saver(module)


def give_back(module: nn.Module) -> None:
    """A module's `save_pretrained` as it was. What another library has put over the `Saver` meanwhile stays."""
    held = module.__dict__.get(_NAME)
    if isinstance(held, Saver):
        del module.__dict__[_NAME]
        if held.before is not None:
            module.__dict__[_NAME] = held.before


def plain_saving(model: Any) -> Callable[..., Any] | None:
    """The model's own `save_pretrained`, which says nothing of adapters; None where it has none."""
    held = getattr(model, _NAME, None)
    return held.__wrapped__ if isinstance(held, Saver) else held


def adapter_keys(module: nn.Module, adapters: Collection[str] | None = None) -> Iterator[str]:
    """The names of adapters' tensors in a module's state dict: of all adapters, or of these."""
    for path, inner in every_path(module):
        held = inner._modules[RESERVED] if RESERVED in inner._modules else None
        if held is not None and is_adapters(held):
            for adapter in held._modules if adapters is None else [name for name in adapters if name in held._modules]:
                for name in tensors_of(inner, adapter):
                    yield ".".join(filter(None, (path, RESERVED, adapter, name)))


def left_out(module: nn.Module) -> list[str]:
    """The adapters on a module that its base's weights do not hold."""
    found: dict[str, None] = {}
    for _, _, site in sites(module):
        merged = site.merged.adapters if site.merged is not None else ()
        found |= dict.fromkeys(one.adapter for one in site.applied if one.adapter not in merged)
    return list(found)


def _without_adapters(module: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gone = {plain_name(name) for name in adapter_keys(module)}
    return {key: tensor for key, tensor in state_dict.items() if plain_name(key) not in gone}


def kept_names(model: nn.Module) -> set[str]:
    """The names, without wrappers' segments, of all tensors that training may change."""
    return {plain_name(name) for name in _kept(model)}


def _kept(model: nn.Module) -> Iterator[str]:
    yield from adapter_keys(model)
    yield from (name for name, parameter in base_parameters(model) if parameter.requires_grad)
    for path, module in base_modules(model):
        yield from (f"{path}.{name}" if path else name for name in module._buffers)
    for path, _, site in sites(model):
        for applied in site.applied:
            yield from (f"{path}.{name}" if path else name for name, _ in applied.changed)


def forgive_missing(model: nn.Module, incompatible: Any) -> None:
    """A hook of `load_state_dict`: a checkpoint of what is trained does not miss the base, where all of that is absent.

    Tensors of adapters, and others that train, are missed as before.
    """
    missing = {plain_name(name) for name in incompatible.missing_keys}
    kept = kept_names(model)
    frozen = {plain_name(name) for name, _ in base_parameters(model)} - kept
    if frozen and frozen <= missing:
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if plain_name(name) in kept]
