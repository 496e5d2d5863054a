"""Reads a module's own tensors and children by name. A `ScriptModule` has mappings without `get`."""

from __future__ import annotations

from torch import Tensor, nn

from surgery.packed.packed_stack import packed_stacks_of

__all__ = ["own_buffer", "own_child", "own_parameter", "parameter_names"]


def parameter_names(module: nn.Module) -> list[str]:
    """The names of the module's own parameters. A packed stack, which may not be a parameter, is the first of them."""
    parameters = list(module._parameters.keys())
    return [*(name for name in packed_stacks_of(module) if name not in parameters), *parameters]


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The module's own parameter; None if it has none of this name."""
    return module._parameters[name] if name in module._parameters else None


def own_buffer(module: nn.Module, name: str) -> Tensor | None:
    """The module's own buffer; None if it has none of this name."""
    return module._buffers[name] if name in module._buffers else None


def own_child(module: nn.Module, name: str) -> nn.Module | None:
    """The module's child; None if it has none of this name."""
    return module._modules[name] if name in module._modules else None
