"""Modules whose tensors accelerate keeps on the CPU or on disk, and brings for each call.

Such a module has the hook `AlignDevicesHook` with `offload`, and its own tensors are on the meta device between calls.
Known by their attributes, so accelerate is not imported here.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.errors import SurgeryError

__all__ = ["is_offloaded", "loads_children", "offload_hook", "offloaded_in", "refuse_offloaded"]


def offload_hook(module: nn.Module) -> Any:
    """Returns the hook that offloads the module's own tensors, or None."""
    hook = module.__dict__.get("_hf_hook")
    for part in getattr(hook, "hooks", (hook,)):
        if getattr(part, "offload", False) is True and getattr(part, "weights_map", None) is not None:
            return part
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings this module's own tensors for each call."""
    return offload_hook(module) is not None


def offloaded_in(module: nn.Module) -> str | None:
    """The path of the first offloaded module in a module; None without any."""
    return next((path for path, part in module.named_modules() if is_offloaded(part)), None)


def refuse_offloaded(model: nn.Module, what: str) -> None:
    """Raise `SurgeryError` if a module of the model is offloaded, for what runs forwards without their hooks."""
    if (path := offloaded_in(model)) is not None:
        raise SurgeryError(
            what,
            where=path,
            why="accelerate brings its weights for calls of the modules alone, and a trace runs their forwards",
            fix="do this before the model is offloaded",
        )


def loads_children(module: nn.Module) -> bool:
    """Whether accelerate brings the tensors of all modules inside this one, too (`preload_module_classes`)."""
    return bool(getattr(offload_hook(module), "place_submodules", False))
