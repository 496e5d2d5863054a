"""Sites that a rule can't tell apart: it is asked about one of them, and the answer holds for all."""

from __future__ import annotations

from collections.abc import Hashable

from torch import nn

from surgery.authoring.hook_call import HookCall
from surgery.authoring.rule import Rule
from surgery.forward.own_forward import settings_of
from surgery.patterns.module_walk import RESERVED

__all__ = ["likeness"]


def likeness(rule: Rule, module: nn.Module, path: str, base: type[nn.Module]) -> Hashable | None:
    """Equal for modules of the class `base` of which a rule says the same; None where it may say something else.

    >>> from torch import nn
    >>> from surgery.planning.equivalent_sites import likeness
    >>> from surgery.rules import LoraRule
    >>> rule, layers = LoraRule("0", rank_pattern={"2": 4}), [nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 9)]
    >>> said = [likeness(rule, layer, "0", nn.Linear) for layer in layers]
    >>> said[0] == said[1], said[0] == said[2], said[0] == likeness(rule, layers[0], "2", nn.Linear)
    (True, False, False)

    A rule answers for itself by `Rule.alike`; this adds all that it may then look at. A module with settings that are
    no plain data, or with children, is like no other.
    """
    if "alike" not in vars(type(rule)):
        return None
    with HookCall(rule, "alike", path):
        said = rule.alike(path)
        hash(said)
    if said is None or any(name != RESERVED for name in module._modules):
        return None
    settings = settings_of(module, base)
    if settings is None:
        return None
    held = (*module._parameters.values(), *module._buffers.values())
    return said, settings, module.training, tuple([(t.shape, t.dtype) for t in held if t is not None])
