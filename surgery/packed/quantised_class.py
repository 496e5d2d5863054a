"""Reads the class of a quantised module, without importing the package that defines it."""

from __future__ import annotations

from abc import ABC

from torch import nn

__all__ = ["AbstractLayout", "PlainLinear", "base_of", "inherits_from_abc", "plain_class", "runs_more", "short_names"]


def base_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without the class that the engine generated."""
    return getattr(type(module), "_surgery_base", type(module))


def short_names(module: nn.Module) -> set[str]:
    """The names of a module's class and its base classes, without the modules that define them."""
    return {cls.__name__ for cls in base_of(module).__mro__}


def runs_more(module: nn.Module) -> bool:
    """Whether the forward of a module of gptqmodel does more than the map: an adapter, or a rotation of its input."""
    return any(getattr(module, name, False) for name in ("adapter", "online_full_had", "online_partial_had"))


class AbstractLayout(ABC):  # noqa: B024  # for its layout alone
    """Gives a class the memory layout of classes that inherit from `abc.ABC`, such as optimum-quanto's `QLinear`.

    Python assigns a new class to an object only if both have the same layout.
    """


class PlainLinear(AbstractLayout, nn.Linear):
    """torch's Linear for modules whose class inherits from `abc.ABC`."""


def plain_class(module: nn.Module) -> type[nn.Linear]:
    """The class of a plain Linear that a module can be made in place."""
    return PlainLinear if inherits_from_abc(module) else nn.Linear


def inherits_from_abc(module: nn.Module) -> bool:
    return ABC in base_of(module).__mro__
