"""The class of a module, whatever rules or wrappers put on top of it."""

from __future__ import annotations

from torch import nn

__all__ = ["class_of"]


def class_of(module: nn.Module) -> type[nn.Module]:
    """A module's own class, also while rules are live on it.

    >>> from torch import nn
    >>> from surgery import apply_rules, class_of
    >>> from surgery.rules import LoraRule
    >>> layer = apply_rules(nn.Linear(4, 4), LoraRule(nn.Linear, rank=2))
    >>> type(layer) is nn.Linear, class_of(layer) is nn.Linear
    (False, True)
    """
    cls = getattr(module, "_surgery_base", type(module))
    while cls.__bases__ and cls.__bases__[0].__name__ == "FSDPModule":  # put on top of it by fully_shard
        cls = cls.__bases__[1]
    return cls
