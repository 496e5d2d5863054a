"""Renews the hooks with which transformers collects hidden states, when modules come to a model.

transformers adds them at the first call that asks for hidden states or attentions, on the modules that are there then,
and marks the model. A module that comes later, such as a dropped layer that `remove` brings back, would not be
collected.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from surgery.patterns.module_class import class_of
from surgery.patterns.module_walk import base_modules
from surgery.transaction.undo_log import Journal

__all__ = ["renew_output_hooks"]

_MARK = "_output_capturing_hooks_installed"


def renew_output_hooks(root: nn.Module, before: Collection[int], journal: Journal) -> None:
    """Take the hooks and the mark off if a module came without them; transformers adds them at the next call.

    `before`: ids of the modules before the change.
    """
    for _, model in list(base_modules(root)):
        if not model.__dict__.get(_MARK):
            continue
        inside = [module for _, module in base_modules(model)]
        new = [module for module in inside if id(module) not in before]
        if not new or any(_hooks(module) for module in new):
            continue
        collected = {class_of(module) for module in inside if _hooks(module)}
        if not collected or any(class_of(module) in collected for module in new):  # not a new head
            _take_off(inside, journal)


def _take_off(modules: Sequence[nn.Module], journal: Journal) -> None:
    for module in modules:
        if _MARK in module.__dict__:
            journal.keep(module.__dict__)
            del module.__dict__[_MARK]
        if keys := _hooks(module):
            journal.keep(module._forward_hooks)
            for key in keys:
                del module._forward_hooks[key]


def _hooks(module: nn.Module) -> list[Any]:
    return [
        key
        for key, hook in module._forward_hooks.items()
        if getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
    ]
