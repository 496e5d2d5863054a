"""Marks weights of transformers' models as untied while a merge unties them, until `unmerge`.

A config that still says "tied" would undo the merge: `tie_weights`, or loading the checkpoint, would give the head the
embedding's weight again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.model_edits.tied_parts import (
    ALL,
    FLAG,
    KEYS,
    class_ties,
    computes_by_flag,
    configs_of,
    declared_ties,
    tensor_named,
    tied_parts,
)
from surgery.state.site_links import module_at
from surgery.transaction.undo_log import Journal

__all__ = ["Untied", "retie", "say_untied", "why_not_said"]

_ABSENT = "(no attribute of its own)"


@dataclass
class Untied:
    """The ties before a merge. Places are paths, so that a copy of the model can use the record."""

    flags: list[tuple[str, bool]] = field(default_factory=list)  # path of a part, of its config or that of its text
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)  # path of a part, attribute, old value
    parameters: list[tuple[str, str, nn.Parameter]] = field(default_factory=list)  # path of a module, name, the shared

    def __bool__(self) -> bool:
        return bool(self.flags or self.attributes or self.parameters)


def say_untied(model: nn.Module, journal: Journal) -> Untied:
    """Mark the broken ties of a model. One flag covers all its ties, so the other ties are broken, too."""
    untied = Untied()
    parts = [(path, part, declared_ties(part)) for path, part in tied_parts(model)]
    broken = [
        part
        for _, part, pairs in parts
        if any(tensor_named(part, a) is not tensor_named(part, b) for a, b in pairs.items())
    ]
    config_ids = {id(config) for part in broken for config in configs_of(part)}
    slots: dict[int, tuple[int, str]] = {}
    for path, part, pairs in parts:
        if not pairs or id(part.config) not in config_ids:
            continue
        for name in dict.fromkeys([*pairs.values(), *pairs]):  # those that others are tied to keep their tensor
            _separate(path, part, name, slots, untied, journal)
        for inside, config in enumerate(configs_of(part) if not computes_by_flag(part) else ()):
            if getattr(config, FLAG, False):
                untied.flags.append((path, bool(inside)))
                journal.attribute(config, FLAG)
                setattr(config, FLAG, False)
        _set(path, part, KEYS, type(getattr(part, KEYS))(), untied, journal)
        names = {f"{path}.{target}" if path else target for target in pairs}
        for outer, owner in tied_parts(model):
            ties = getattr(owner, ALL, None)
            begin = f"{outer}." if outer else ""
            if isinstance(ties, dict) and any(begin + name in names for name in ties):
                _set(outer, owner, ALL, {k: v for k, v in ties.items() if begin + k not in names}, untied, journal)
    return untied


def why_not_said(model: nn.Module) -> str | None:
    """Returns why a checkpoint can't mark weights as untied (a forward depends on the flag), or None."""
    for _, part in tied_parts(model):
        ties = class_ties(part) if getattr(part.config, FLAG, False) else {}
        broken = any(tensor_named(part, a) is not tensor_named(part, b) for a, b in ties.items())
        if broken and computes_by_flag(part):
            return f"{type(part).__name__}.forward computes something else if {FLAG} is False"
    return None


def retie(model: nn.Module, untied: Untied, journal: Journal) -> None:
    """Restore the ties before the merge."""
    for path, name, parameter in reversed(untied.parameters):
        if (owner := module_at(model, path)) is not None:
            journal.keep(owner._parameters)
            owner._parameters[name] = parameter
    for path, name, value in reversed(untied.attributes):
        if (part := module_at(model, path)) is not None:
            journal.attribute(part, name)
            if isinstance(value, str):
                part.__dict__.pop(name, None)
            else:
                setattr(part, name, value)
    for path, inside in untied.flags:
        if (part := module_at(model, path)) is not None:
            config = configs_of(part)[inside]
            journal.attribute(config, FLAG)
            setattr(config, FLAG, True)


def _separate(
    path: str, part: nn.Module, name: str, slots: dict[int, tuple[int, str]], untied: Untied, journal: Journal
) -> None:
    """Replace a parameter that stands in another slot, too, by a separate copy with the same numbers.

    `slots`: the first slot of each parameter, as its module's identity and its name, by the parameter's identity.
    """
    inner, _, last = name.rpartition(".")
    owner, shared = module_at(part, inner), tensor_named(part, name)
    if owner is None or not isinstance(shared, nn.Parameter):
        return
    slot = (id(owner), last)
    if slots.setdefault(id(shared), slot) == slot:
        return
    journal.keep(owner._parameters)
    untied.parameters.append((".".join(filter(None, (path, inner))), last, shared))
    copied = owner._parameters[last] = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    slots[id(copied)] = slot


def _set(path: str, part: Any, name: str, value: Any, untied: Untied, journal: Journal) -> None:
    journal.attribute(part, name)
    untied.attributes.append((path, name, part.__dict__.get(name, _ABSENT)))
    setattr(part, name, value)
