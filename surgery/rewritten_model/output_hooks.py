"""Renews the hooks with which transformers collects hidden states, when modules come to a model.

transformers adds them at the first call that asks for hidden states or attentions, on the modules that are there then,
and marks the model. A module that comes later, such as a dropped layer that `remove` brings back, would not be
collected.
"""

from __future__ import annotations

from collections.abc import Collection
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
    marked = [module for _, module in base_modules(root) if module.__dict__.get(_MARK)]
    marked = [part for part in marked if any(id(module) not in before for _, module in base_modules(part))]
    if not marked:
        return
    new = [module for _, module in base_modules(root) if id(module) not in before]
    if not new or any(_hooks(module) for module in new):
        return
    collected = {class_of(module) for _, module in base_modules(root) if _hooks(module)}
    if collected and not any(class_of(module) in collected for module in new):  # such as a new head
        return
    for module in marked:
        journal.keep(module.__dict__)
        del module.__dict__[_MARK]
    for _, module in base_modules(root):
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
