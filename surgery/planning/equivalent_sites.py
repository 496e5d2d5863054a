"""Groups sites that are identical for a rule, so that the rule is recorded once for each group."""

from __future__ import annotations

from collections.abc import Hashable

from torch import nn

from surgery.authoring.hook_call import HookCall
from surgery.authoring.rule import Rule
from surgery.forward.own_forward import settings_of
from surgery.patterns.module_walk import RESERVED

__all__ = ["site_key"]


def site_key(rule: Rule, module: nn.Module, path: str, base: type[nn.Module]) -> Hashable | None:
    """A key that is equal for modules of class `base` for which a rule records the same; None: no key.

    >>> from torch import nn
    >>> from surgery.planning.equivalent_sites import site_key
    >>> from surgery.rules import LoraRule
    >>> rule, layers = LoraRule("0", rank_pattern={"2": 4}), [nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 9)]
    >>> keys = [site_key(rule, layer, "0", nn.Linear) for layer in layers]
    >>> keys[0] == keys[1], keys[0] == keys[2], keys[0] == site_key(rule, layers[0], "2", nn.Linear)
    (True, False, False)

    `Rule.alike` gives the rule's part of the key; the module's settings, mode, shapes and dtypes are the rest. A module
    with children, or with settings that are not plain data, does not have a key.
    """
    if "alike" not in vars(type(rule)):
        return None
    with HookCall(rule, "alike", path):
        rule_key = rule.alike(path)
        hash(rule_key)
    if rule_key is None or any(name != RESERVED for name in module._modules.keys()):
        return None
    settings = settings_of(module, base)
    if settings is None:
        return None
    tensors = (*module._parameters.values(), *module._buffers.values())
    return rule_key, settings, module.training, tuple([(t.shape, t.dtype) for t in tensors if t is not None])
