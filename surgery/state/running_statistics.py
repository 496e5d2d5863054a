"""Restores buffers that training changes, such as the running mean of a BatchNorm.

While adapters train, the base's running statistics change, too, as in PEFT. A module with such buffers stores the
base's values in its `__dict__`. They are exchanged when no adapter is live, and restored with the last adapter.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import abbreviate
from surgery.patterns.module_walk import base_modules
from surgery.patterns.own_entries import own_buffer
from surgery.transaction.gradient_flags import is_lazy
from surgery.transaction.undo_log import Journal

__all__ = [
    "exchange",
    "forget_statistics",
    "keep_statistics",
    "module_names",
    "changed_modules",
    "changing_buffers",
    "moving_modules",
    "restore_statistics",
]

_KEPT = "_surgery_statistics"
_LATER = ("__init__", "reset_", "_load", "_save", "_apply", "extra_repr", "__setstate__", "to")


@dataclass
class Kept:
    """The inactive values of a module's buffers: the base's values, or the values under the adapters."""

    values: dict[str, Tensor]
    base: bool = True


def moving_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the base's modules with buffers that training changes."""
    for path, module in base_modules(model):
        if module._buffers and changing_buffers(module):
            yield path, module


def changing_buffers(module: nn.Module) -> list[str]:
    """Returns the names of the buffers that the module's forward changes in training mode."""
    buffers = {name: tensor for name, tensor in module._buffers.items() if tensor is not None and not is_lazy(tensor)}
    if getattr(module, "track_running_stats", False) is True:  # BatchNorm, InstanceNorm: torch updates them
        return [name for name in buffers if name.startswith("running_") or name == "num_batches_tracked"]
    hooks = [hook for hook in module._forward_pre_hooks.values() if type(hook).__name__ == "SpectralNorm"]
    hooked = {f"{getattr(hook, 'name', '')}_{end}" for hook in hooks for end in "uv"}
    written = _assigned_attributes(getattr(module, "_surgery_base", type(module)))
    return [name for name in buffers if name in written or name in hooked]


@functools.cache
def _assigned_attributes(cls: type[nn.Module]) -> frozenset[str]:
    """Returns the attributes that a class's methods assign, or change by a method that ends with `_`."""
    names: set[str] = set()
    for kind in cls.__mro__:
        if kind is nn.Module:
            break
        for name, method in vars(kind).items():
            if inspect.isfunction(method) and not name.startswith(_LATER):
                names |= _attributes_assigned_in(method)
    return frozenset(names)


def _attributes_assigned_in(method: Any) -> set[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        places: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            places = [part for target in node.targets for part in _parts(target)]
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            places = [node.target]
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute) and function.attr.endswith("_") and function.attr[0] != "_":
                places = [function.value]  # self.mean.lerp_(…)
            places += [word.value for word in node.keywords if word.arg == "out"]
        names.update(name for place in places if (name := _of_self(place)))
    return names


def _parts(target: ast.expr) -> list[ast.expr]:
    return list(target.elts) if isinstance(target, (ast.Tuple, ast.List)) else [target]


def _of_self(place: ast.expr) -> str | None:
    """Returns `mean` for self.mean, self.mean[…] and self.mean.data."""
    while isinstance(place, (ast.Subscript, ast.Attribute)):
        if isinstance(place, ast.Attribute) and isinstance(place.value, ast.Name) and place.value.id == "self":
            return place.attr
        place = place.value
    return None


def module_names(paths: Sequence[str]) -> str:
    """Names modules in a sentence.

    >>> module_names(["1"]), module_names(["1", ""]), module_names([str(index) for index in range(9)])
    ("module '1'", "modules '1', '' (the model itself)", "9 modules, such as '0', '1'")
    """
    quoted = [repr(path) if path else "'' (the model itself)" for path in paths]
    noun = "" if len(paths) > 5 else "module " if len(paths) == 1 else "modules "
    return noun + abbreviate(quoted, "modules")


# On a model ---------------------------------------------------------------------------------------------------


def keep_statistics(model: nn.Module, journal: Journal) -> list[nn.Module]:
    """Store the base's values before the first adapter. Returns the modules with such buffers."""
    modules = [module for _, module in moving_modules(model)]
    for module in modules:
        journal.keep(module.__dict__)
        module.__dict__[_KEPT] = Kept({name: _copy(module._buffers[name]) for name in changing_buffers(module)})
    if modules:
        journal.keep(model._load_state_dict_pre_hooks)
        model.register_load_state_dict_pre_hook(_store_loaded_values)
    return modules


def changed_modules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Returns the modules whose values under the adapters differ from the base's."""
    changed = []
    for module in modules:
        stored: Kept | None = module.__dict__.get(_KEPT)
        pairs = (
            [(value, own_buffer(module, name)) for name, value in stored.values.items()] if stored is not None else []
        )
        if any(tensor is not None and _differ(value, tensor) for value, tensor in pairs):
            changed.append(module)
    return changed


def exchange(modules: Iterable[nn.Module], journal: Journal, base: bool) -> None:
    """Set buffers to the base's values, or to those under the adapters, and store the other values."""
    for module in modules:
        stored: Kept | None = module.__dict__.get(_KEPT)
        if stored is None or stored.base is not base:
            continue
        present = {name: _copy(tensor) for name in stored.values if (tensor := own_buffer(module, name)) is not None}
        journal.keep(stored.__dict__)
        journal.undo(_set_buffers, module, present)
        _set_buffers(module, stored.values)
        stored.values, stored.base = present, not base


def restore_statistics(model: nn.Module, modules: Iterable[nn.Module], journal: Journal) -> None:
    """Restore the base's values after the last adapter, and remove the stored values."""
    exchange(modules, journal, True)
    forget_statistics(model, modules, journal)


def forget_statistics(model: nn.Module, modules: Iterable[nn.Module], journal: Journal) -> None:
    """Remove the stored values: the present values become the base's."""
    for module in modules:
        journal.keep(module.__dict__)
        module.__dict__.pop(_KEPT, None)
    for key, hook in list(model._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", None) is _store_loaded_values:
            journal.keep(model._load_state_dict_pre_hooks)
            del model._load_state_dict_pre_hooks[key]


def _store_loaded_values(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """A hook for loaded state dicts. Without adapters in it, a state dict contains new values of the base."""
    if any(".adapters." in key for key in state_dict):
        return
    for path, module in base_modules(model):
        stored: Kept | None = module.__dict__.get(_KEPT)
        for name in stored.values if stored is not None and stored.base else ():
            value = state_dict.get(prefix + ".".join(filter(None, (path, name))))
            if isinstance(value, Tensor) and value.shape == stored.values[name].shape:  # type: ignore[union-attr]
                stored.values[name] = _copy(value)  # type: ignore[union-attr]


def _differ(value: Tensor, tensor: Tensor) -> bool:
    return not (value.is_meta or tensor.is_meta) and not torch.equal(tensor, value.to(tensor.device))


def _copy(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    with torch.no_grad():
        return tensor.detach().clone()


def _set_buffers(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        tensor = own_buffer(module, name)
        if tensor is not None and tensor.shape == value.shape and not value.is_meta and not tensor.is_meta:
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(value)
