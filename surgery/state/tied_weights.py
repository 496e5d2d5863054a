"""Marks weights of transformers' models as untied while a merge unties them, until `unmerge`.

A config that still says "tied" would undo the merge: `tie_weights`, or loading the checkpoint, would give the head the
embedding's weight again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.patterns.module_walk import base_modules
from surgery.state.site_links import module_at
from surgery.transaction.undo_log import Journal

__all__ = ["Untied", "retie", "say_untied", "why_not_said"]

_FLAG, _KEYS, _ALL = "tie_word_embeddings", "_tied_weights_keys", "all_tied_weights_keys"
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
    parts = [(path, part, _pairs(part)) for path, part in _parts(model)]
    broken = [
        part for _, part, pairs in parts if any(_tensor(part, a) is not _tensor(part, b) for a, b in pairs.items())
    ]
    config_ids = {id(config) for part in broken for config in _configs(part)}
    for path, part, pairs in parts:
        if not pairs or id(part.config) not in config_ids:
            continue
        for target, source in pairs.items():
            _separate(path, part, target, source, untied, journal)
        for inside, config in enumerate(_configs(part) if not _computes_by_flag(part) else ()):
            if getattr(config, _FLAG, False):
                untied.flags.append((path, bool(inside)))
                journal.attribute(config, _FLAG)
                setattr(config, _FLAG, False)
        _set(path, part, _KEYS, type(getattr(part, _KEYS))(), untied, journal)
        names = {f"{path}.{target}" if path else target for target in pairs}
        for outer, owner in _parts(model):
            ties = getattr(owner, _ALL, None)
            begin = f"{outer}." if outer else ""
            if isinstance(ties, dict) and any(begin + name in names for name in ties):
                _set(outer, owner, _ALL, {k: v for k, v in ties.items() if begin + k not in names}, untied, journal)
    return untied


def why_not_said(model: nn.Module) -> str | None:
    """Returns why a checkpoint can't mark weights as untied (a forward depends on the flag), or None."""
    for _, part in _parts(model):
        broken = any(_tensor(part, a) is not _tensor(part, b) for a, b in _declared(part).items())
        if broken and _computes_by_flag(part):
            return f"{type(part).__name__}.forward computes something else if {_FLAG} is False"
    return None


def _declared(part: Any) -> dict[str, str]:
    """Returns the ties that a part's class declares, whatever the part says at present."""
    keys = getattr(type(part), _KEYS, None)
    return keys if isinstance(keys, dict) and getattr(part.config, _FLAG, False) else {}


def _computes_by_flag(part: nn.Module) -> bool:
    """Whether a forward reads the flag. UMT5's does: it scales the input of its head if the weights are tied."""
    base = getattr(type(part), "_surgery_base", type(part))
    try:
        return f".{_FLAG}" in inspect.getsource(inspect.unwrap(base.forward))
    except (OSError, TypeError):
        return False


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
            config = _configs(part)[inside]
            journal.attribute(config, _FLAG)
            setattr(config, _FLAG, True)


def _parts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in base_modules(model):
        if getattr(type(module), _KEYS, None) and hasattr(module, "config"):
            yield path, module


def _pairs(part: Any) -> dict[str, str]:
    """Returns the ties of a part without its children: parameter name → name of the parameter that it shares."""
    expanded = getattr(part, "get_expanded_tied_weights_keys", None)
    if expanded is not None:
        return expanded(all_submodels=False)
    if not getattr(part.config, _FLAG, False):
        return {}
    names = {id(module): path for path, module in base_modules(part)}  # before transformers 5: the head alone
    head, embedding = part.get_output_embeddings(), part.get_input_embeddings()
    if head is None or embedding is None or not {id(head), id(embedding)} <= names.keys():
        return {}
    return {f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"}


def _configs(part: Any) -> list[Any]:
    text = getattr(part.config, "get_text_config", lambda: part.config)()
    return [part.config] if text is part.config else [part.config, text]


def _tensor(part: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    owner = module_at(part, path)
    return None if owner is None else {**owner._parameters, **owner._buffers}.get(last)


def _separate(path: str, part: nn.Module, target: str, source: str, untied: Untied, journal: Journal) -> None:
    """Replace a shared parameter by a separate copy with the same numbers."""
    inner, _, name = target.rpartition(".")
    owner, shared = module_at(part, inner), _tensor(part, target)
    if owner is None or not isinstance(shared, nn.Parameter) or shared is not _tensor(part, source):
        return
    journal.keep(owner._parameters)
    untied.parameters.append((".".join(filter(None, (path, inner))), name, shared))
    owner._parameters[name] = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)


def _set(path: str, part: Any, name: str, value: Any, untied: Untied, journal: Journal) -> None:
    journal.attribute(part, name)
    untied.attributes.append((path, name, part.__dict__.get(name, _ABSENT)))
    setattr(part, name, value)
