"""Makes two parameters one, or gives a shared parameter values of its own, and declares it to transformers.

A model of transformers ties weights again in `tie_weights`, as its class and `config.tie_word_embeddings` say. So what
the model declares changes together with its parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from surgery.errors import SiteError, abbreviate
from surgery.model_edits.edit_log import EditLog
from surgery.model_edits.plain_model import config_problem
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
from surgery.patterns.module_class import class_of
from surgery.patterns.module_walk import base_modules
from surgery.patterns.wrappers import submodule

__all__ = ["broken_ties", "declare_broken", "tie_parameters", "untie_parameters"]


def tie_parameters(edits: EditLog, paths: Sequence[str], name: str, source: str | None) -> None:
    """Put one parameter in the place of others.

    Args:
        edits: the edits of the rule.
        paths: the paths of the modules; empty: the output head.
        name: the name of their parameter.
        source: the path of the parameter that takes its place; None: the weight of the input embedding.
    """
    model = edits.model
    source = f"{_embedding(model, 'get_input_embeddings')}.weight" if source is None else source
    parameter = tensor_named(model, source)
    if not isinstance(parameter, nn.Parameter):
        raise SiteError(f"there is no parameter {source}", fix="name it with its path: 'model.embed_tokens.weight'")
    for path in paths or [_embedding(model, "get_output_embeddings")]:
        owner = submodule(model, path)
        old = owner._parameters.get(name)
        full = ".".join(filter(None, (path, name)))
        if old is None:
            raise SiteError(
                f"a {class_of(owner).__name__} does not have a parameter {name!r}", where=path or "(the model)"
            )
        if old is parameter:
            raise SiteError(f"{full} and {source} are one parameter already", fix="leave this rule out")
        if old.shape != parameter.shape or old.dtype != parameter.dtype or type(old) is not type(parameter):
            raise SiteError(
                f"{full} and {source} can't be one parameter",
                why=" and ".join(f"{tuple(one.shape)} in {one.dtype}" for one in (old, parameter)),
                fix="tie parameters of one shape and one dtype",
            )
        edits.set_parameter(owner, name, parameter)
        edits.steps.append((path, class_of(owner).__name__, f"{name} is {source}"))
        _declare_tie(edits, full, source)


def untie_parameters(edits: EditLog, paths: Sequence[str], name: str | None, *, trainable: bool) -> None:
    """Give modules parameters of their own, with the values that they shared.

    Args:
        edits: the edits of the rule.
        paths: the paths of the modules; empty: the output head.
        name: the name of their parameter; None: all that they share with other modules.
        trainable: whether the new parameters train with the adapter.
    """
    model = edits.model
    for path in paths or [_embedding(model, "get_output_embeddings")]:
        owner = submodule(model, path)
        names = [name] if name is not None else list(owner._parameters)
        shared = {own: _others(model, owner, own) for own in names}
        shared = {own: others for own, others in shared.items() if others}
        if not shared:
            raise SiteError(
                f"the {name or 'parameters'} of this {class_of(owner).__name__} "
                f"{'is' if name else 'are'} not shared with another module",
                where=path or "(the model itself)",
                fix="leave this rule out, or name the module that shares a parameter",
            )
        for own, others in shared.items():
            old: Any = owner._parameters[own]
            new = nn.Parameter(old.detach().clone(), requires_grad=trainable or old.requires_grad)
            edits.set_parameter(owner, own, new)
            edits.store(path, own, trainable=trainable)
            edits.steps.append((path, class_of(owner).__name__, f"own {own}, apart from {abbreviate(others)}"))
    declare_broken(edits)


def _embedding(model: nn.Module, getter: str) -> str:
    paths = {id(module): path for path, module in base_modules(model)}
    for _, part in base_modules(model):
        if callable(getattr(part, getter, None)):
            try:
                module: Any = getattr(part, getter)()
            except (AttributeError, NotImplementedError):
                continue
            if id(module) in paths and "weight" in module._parameters:
                return paths[id(module)]
    what = "head" if "output" in getter else "embedding"
    raise SiteError(
        f"this {class_of(model).__name__} does not say which module is its {what}",
        why=f"no {getter} of it returns a module with a weight",
        fix="name the modules: TieRule('head', to='embed.weight'), UntieRule('head')",
    )


def _others(model: nn.Module, owner: nn.Module, name: str) -> list[str]:
    """The other names of a parameter."""
    parameter = owner._parameters.get(name)
    return [
        ".".join(filter(None, (path, other)))
        for path, module in base_modules(model)
        for other, tensor in module._parameters.items()
        if tensor is not None and tensor is parameter and (module, other) != (owner, name)
    ]


# What transformers is told --------------------------------------------------------------------------------------


def broken_ties(model: nn.Module) -> set[tuple[str, str]]:
    """The declared ties of parameters that are not one, each as the path of the part and the name in it."""
    broken = set()
    for path, part in tied_parts(model):
        for first, second in declared_ties(part).items():
            tensors = tensor_named(part, first), tensor_named(part, second)
            if all(tensor is not None for tensor in tensors) and tensors[0] is not tensors[1]:
                broken.add((path, first))
    return broken


def declare_broken(edits: EditLog) -> None:
    """Take the ties that are broken out of what the parts of the model declare.

    Otherwise `tie_weights` of transformers puts the shared parameter back, when a model is resized, saved or loaded.
    """
    parts = [(path, part, declared_ties(part)) for path, part in tied_parts(edits.model)]
    staying = {id(part): {a: b for a, b in ties.items() if _same(part, a, b)} for _, part, ties in parts}
    for path, part, ties in parts:
        if staying[id(part)] == ties:
            continue
        edits.set_attribute(part, KEYS, staying[id(part)])
        _list_ties(edits)
        alike = [other for _, other, _ in parts if other.config is part.config]
        if any(staying[id(other)] or computes_by_flag(other) for other in alike):
            if not hasattr(part, "get_expanded_tied_weights_keys"):  # transformers 5 compares values when it loads
                edits.unplain.append(f"one flag of {type(part.config).__name__} ties all of {', '.join(ties)}")
            continue
        _set_flag(edits, path, part, False)


def _declare_tie(edits: EditLog, target: str, source: str) -> None:
    """Add a tie to what the part of the model declares whose class knows it, or to the outermost part."""
    owner: tuple[str, Any] | None = None
    for path, part in tied_parts(edits.model):
        prefix = f"{path}." if path else ""
        ties = class_ties(part)
        if any({f"{prefix}{a}", f"{prefix}{b}"} == {target, source} for a, b in ties.items()):
            same = {a: b for a, b in ties.items() if _same(part, a, b)}
            if not getattr(part.config, FLAG, False) and same == ties:
                _set_flag(edits, path, part, True)
            elif same != ties:
                edits.unplain.append(f"one flag of {type(part.config).__name__} ties all of {', '.join(ties)}")
            if getattr(part, KEYS) != same:
                edits.set_attribute(part, KEYS, same)
            return _list_ties(edits)
        inside = target.startswith(prefix) and source.startswith(prefix)
        owner = owner or ((path, part) if inside else None)
    for path, module in base_modules(edits.model) if owner is None else ():
        if hasattr(module, "config") and hasattr(module, "save_pretrained"):
            owner = path, module
            break
    if owner is not None:
        path, part = owner
        own = {name.removeprefix(f"{path}." if path else "") for name in (target,)}.pop()
        other = source.removeprefix(f"{path}." if path else "")
        edits.set_attribute(part, KEYS, {**(getattr(part, KEYS, None) or {}), own: other})
        edits.unplain.append(f"{class_of(part).__name__} does not tie {own} to {other}")
        _list_ties(edits)


def _list_ties(edits: EditLog) -> None:
    """Renew the lists of ties that transformers makes when it builds a model."""
    for _, owner in _listing(edits.model):
        present = getattr(owner, ALL)
        ties = {
            f"{path}.{a}" if path else a: f"{path}.{b}" if path else b
            for path, part in tied_parts(owner)
            for a, b in {**declared_ties(part), **(getattr(part, KEYS) if KEYS in part.__dict__ else {})}.items()
            if _same(part, a, b)
        }
        if ties != present:
            edits.set_attribute(owner, ALL, ties)


def _listing(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in base_modules(model):
        if isinstance(module.__dict__.get(ALL), dict):
            yield path, module


def _set_flag(edits: EditLog, path: str, part: Any, value: bool) -> None:
    old = part.config
    new = copy.deepcopy(old)
    for present, config in zip(configs_of(part), _configs_in(new), strict=True):
        if hasattr(present, FLAG):
            setattr(config, FLAG, value)
    problem = config_problem(new, part)
    if problem is not None and config_problem(old, part) is None:
        raise SiteError(
            f"{type(old).__name__} does not take {FLAG}={value}",
            where=path or "(the model itself)",
            why=problem,
            fix="leave this rule out",
        )
    edits.set_config(old, new, path)


def _configs_in(config: Any) -> list[Any]:
    text = getattr(config, "get_text_config", lambda: config)()
    return [config] if text is config else [config, text]


def _same(part: nn.Module, first: str, second: str) -> bool:
    tensor = tensor_named(part, first)
    return tensor is not None and tensor is tensor_named(part, second)
