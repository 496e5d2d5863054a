"""Tied weights of transformers' models: where a merge unties some, all that says so agrees, until `unmerge`.

A config that went on saying "tied" would undo the merge: `tie_weights` would give the head the embedding's weight
again, and so would whoever loads the checkpoint.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.patterns.module_walk import base_modules
from surgery.state.site_links import there
from surgery.transaction.undo_log import Journal

__all__ = ["Untied", "retie", "say_untied", "why_not_said"]

_FLAG, _KEYS, _ALL = "tie_word_embeddings", "_tied_weights_keys", "all_tied_weights_keys"
_ABSENT = "(no attribute of its own)"


@dataclass
class Untied:
    """What was said of ties before a merge untied some. Places by path, so that a copy of the model has it, too."""

    flags: list[tuple[str, bool]] = field(default_factory=list)  # path of a part, of its config or that of its text
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)  # path of a part, attribute, what it was
    parameters: list[tuple[str, str, nn.Parameter]] = field(default_factory=list)  # path of a module, name, the shared

    def __bool__(self) -> bool:
        return bool(self.flags or self.attributes or self.parameters)


def say_untied(model: nn.Module, journal: Journal) -> Untied:
    """Have the model say what is no longer tied. One flag stands for all ties of a model, so the others go, too."""
    found = Untied()
    parts = [(path, part, _pairs(part)) for path, part in _parts(model)]
    broken = [
        part for _, part, pairs in parts if any(_tensor(part, a) is not _tensor(part, b) for a, b in pairs.items())
    ]
    saying = {id(config) for part in broken for config in _configs(part)}
    for path, part, pairs in parts:
        if not pairs or id(part.config) not in saying:
            continue
        for target, source in pairs.items():
            _part_ways(path, part, target, source, found, journal)
        for inside, config in enumerate(_configs(part) if not _computes_by_flag(part) else ()):
            if getattr(config, _FLAG, False):
                found.flags.append((path, bool(inside)))
                journal.attribute(config, _FLAG)
                setattr(config, _FLAG, False)
        _set(path, part, _KEYS, type(getattr(part, _KEYS))(), found, journal)
        names = {f"{path}.{target}" if path else target for target in pairs}
        for outer, owner in _parts(model):
            held = getattr(owner, _ALL, None)
            begin = f"{outer}." if outer else ""
            if isinstance(held, dict) and any(begin + name in names for name in held):
                _set(outer, owner, _ALL, {k: v for k, v in held.items() if begin + k not in names}, found, journal)
    return found


def why_not_said(model: nn.Module) -> str | None:
    """Why a checkpoint can't say that weights are no longer tied: a forward computes otherwise where they are not."""
    for _, part in _parts(model):
        broken = any(_tensor(part, a) is not _tensor(part, b) for a, b in _declared(part).items())
        if broken and _computes_by_flag(part):
            return f"{type(part).__name__}.forward computes otherwise where {_FLAG} is False"
    return None


def _declared(part: Any) -> dict[str, str]:
    """What a part's class ties, whatever is said of it at present."""
    keys = getattr(type(part), _KEYS, None)
    return keys if isinstance(keys, dict) and getattr(part.config, _FLAG, False) else {}


def _computes_by_flag(part: nn.Module) -> bool:
    """Whether a forward asks the flag, as UMT5's does, which scales what its head gets where the weights are tied."""
    base = getattr(type(part), "_surgery_base", type(part))
    try:
        return f".{_FLAG}" in inspect.getsource(inspect.unwrap(base.forward))
    except (OSError, TypeError):
        return False


def retie(model: nn.Module, untied: Untied, journal: Journal) -> None:
    """Say again what was said before."""
    for path, name, parameter in reversed(untied.parameters):
        if (owner := there(model, path)) is not None:
            journal.keep(owner._parameters)
            owner._parameters[name] = parameter
    for path, name, value in reversed(untied.attributes):
        if (part := there(model, path)) is not None:
            journal.attribute(part, name)
            if isinstance(value, str):
                part.__dict__.pop(name, None)
            else:
                setattr(part, name, value)
    for path, inside in untied.flags:
        if (part := there(model, path)) is not None:
            config = _configs(part)[inside]
            journal.attribute(config, _FLAG)
            setattr(config, _FLAG, True)


def _parts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in base_modules(model):
        if getattr(type(module), _KEYS, None) and hasattr(module, "config"):
            yield path, module


def _pairs(part: Any) -> dict[str, str]:
    """What a part ties by itself, parameter by parameter: the name of each, and of the one it is."""
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
    owner = there(part, path)
    return None if owner is None else {**owner._parameters, **owner._buffers}.get(last)


def _part_ways(path: str, part: nn.Module, target: str, source: str, found: Untied, journal: Journal) -> None:
    """Give a parameter that is still shared one of its own, of the same numbers."""
    inner, _, name = target.rpartition(".")
    owner, shared = there(part, inner), _tensor(part, target)
    if owner is None or not isinstance(shared, nn.Parameter) or shared is not _tensor(part, source):
        return
    journal.keep(owner._parameters)
    found.parameters.append((".".join(filter(None, (path, inner))), name, shared))
    owner._parameters[name] = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)


def _set(path: str, part: Any, name: str, value: Any, found: Untied, journal: Journal) -> None:
    journal.attribute(part, name)
    found.attributes.append((path, name, part.__dict__.get(name, _ABSENT)))
    setattr(part, name, value)
