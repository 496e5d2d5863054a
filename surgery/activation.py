"""Which adapters are live: switched at their sites alone, by classes made once, with all others present untouched."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from surgery.engine import install_live
from surgery.errors import SurgeryError
from surgery.install import reason_against
from surgery.journal import Journal
from surgery.rule import Rule
from surgery.state import Applied, ModelState, adapter_names, require_state, site_state, tensors_of

__all__ = ["Adapter", "activate", "active", "adapters", "deactivate", "using"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Adapter:
    """What `adapters` tells of one: its rules, its sites' paths, how many parameters, whether it is live, or merged."""

    rules: tuple[Rule, ...]
    sites: tuple[str, ...]
    parameters: int
    live: bool
    merged: bool


def activate(model: M, adapter: str | Sequence[str]) -> M:
    """Make these adapters live, and no others; the same model comes back.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import activate, active, apply_rules
    >>> from rules import LoraRule
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> for name in ("a", "b"):
    ...     _ = apply_rules(model, LoraRule("0", rank=2), adapter=name)
    >>> active(model)
    ('a', 'b')
    >>> active(activate(model, "b"))
    ('b',)

    Only live adapters train: the others' tensors stop requiring gradients, and get their flags back with `activate`. A
    site that no live adapter touches has its own class. The edits of several stand in the order they were applied in.

    All or nothing. Raises `SurgeryError` for an unknown adapter, for a merged model, for an adapter that changed the
    base's weights at its start (PiSSA), which can be removed but not be idle, and while another thread is in `using`.
    PEFT: `set_adapter`.
    """
    names = adapter_names(require_state(model), adapter)
    _check_owner(model)
    _switch(model, set(names))
    return model


def deactivate(model: M) -> M:
    """Make no adapter live: the model gives the base's bits, and every site has its own class. See `activate`.

    >>> from torch import nn
    >>> from surgery import apply_rules, deactivate
    >>> from rules import LoraRule
    >>> model = deactivate(apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2)))
    >>> type(model[0]) is nn.Linear
    True

    PEFT: `disable_adapter_layers`.
    """
    require_state(model)
    _check_owner(model)
    _switch(model, set())
    return model


def active(model: nn.Module) -> tuple[str, ...]:
    """The live adapters, in the order they were applied; merged ones too.

    >>> from torch import nn
    >>> from surgery import active, apply_rules
    >>> from rules import LoraRule
    >>> active(apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2)))
    ('default',)
    """
    state = require_state(model)
    return tuple(name for name in state.adapters if name not in state.idle)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """What each adapter is: rules, sites, parameters, live or not, merged or not.

    >>> from torch import nn
    >>> from surgery import adapters, apply_rules
    >>> from rules import LoraRule
    >>> found = adapters(apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2), adapter="a"))
    >>> found["a"].sites, found["a"].parameters, found["a"].live
    (('0',), 32, True)
    """
    state = require_state(model)
    paths = {id(module): path for path, module in model.named_modules()}
    return {
        name: Adapter(
            rules,
            tuple(paths[id(site)] for site, _ in state.places[name] if id(site) in paths),
            sum(t.numel() for s, _ in state.places[name] for t in tensors_of(s, name).values() if _is_trained(t)),
            name not in state.idle,
            any(_is_merged(site, name) for site, _ in state.places[name]),
        )
        for name, rules in state.adapters.items()
    }


@contextmanager
def using(model: nn.Module, adapter: str | Sequence[str] | None) -> Iterator[None]:
    """These adapters are live inside the block (None: none is); on exit those from before are, exceptions included.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import active, apply_rules, using
    >>> from rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2))
    >>> with using(model, None):
    ...     active(model)
    ()
    >>> active(model)
    ('default',)

    A model has one set of live adapters for all threads: a second thread that enters meanwhile gets a `SurgeryError`.
    PEFT: `disable_adapter()`, and `set_adapter` twice.
    """
    state = require_state(model)
    names = [] if adapter is None else adapter_names(state, adapter)
    with _claim:
        _check_owner(model)
        before, depth = set(active(model)), _owners.get(model, (0, 0))[1]
        _owners[model] = (threading.get_ident(), depth + 1)
    try:
        _switch(model, set(names))
        yield
    finally:
        with _claim:
            if depth:
                _owners[model] = (threading.get_ident(), depth)
            else:
                del _owners[model]
        _switch(model, before & set(state.adapters))


def _check_owner(model: nn.Module) -> None:
    owner = _owners.get(model)
    if owner is not None and owner[0] != threading.get_ident():
        raise SurgeryError(
            "another thread is using adapters of this model",
            why="a model has one set of live adapters for all threads",
            fix="wait for it, or give each thread a copy of the model",
        )


def _switch(model: nn.Module, names: set[str]) -> None:
    state, key = require_state(model), frozenset(names)
    changed = [name for name in state.adapters if (name in names) == (name in state.idle)]
    places = {id(module): module for name in changed for module, _ in state.places[name]}.values()
    for module in places:
        _check(module)
    for name in changed:
        if name not in names:
            _check_leaving(state, name)
    with Journal() as journal:
        for name in changed:
            journal.undo(_set_live, state, name, name not in names)
            _set_live(state, name, name in names)
        for module in places:
            install_live(module, journal, known=key)
        for path, name, before, live in state.switched:
            reader = model.get_submodule(path)
            journal.undo(setattr, reader, name, getattr(reader, name))
            setattr(reader, name, live if names else before)
        _set_idle(state, names, journal)
        for name in changed:
            for module, rules in state.places[name]:
                _set_flags(tensors_of(module, name), rules, name in names)


def _set_live(state: ModelState, name: str, live: bool) -> None:
    for _, rules in state.places[name]:
        for applied in rules:
            applied.live = live


def _check(module: nn.Module) -> None:
    held = site_state(module)
    if held is None:
        raise SurgeryError("a site of this model has lost its record", fix="copy models with copy.deepcopy")
    if held.merged is not None:
        why = f"its weights hold {', '.join(held.merged.adapters)}"
        raise SurgeryError("the model is merged", where=held.path, why=why, fix="unmerge(model) first")
    if "forward" not in module.__dict__ and (type(module) is held.base or "_surgery_recipe" in vars(type(module))):
        return
    refused = reason_against(module)
    if refused is not None:
        raise SurgeryError("the site can't be given another class", where=held.path, why=refused[0], fix=refused[1])


def _check_leaving(state: ModelState, name: str) -> None:
    for module, rules in state.places[name]:
        for applied in rules:
            if applied.changed:
                held = site_state(module)
                raise SurgeryError(
                    f"the adapter {name!r} can't be idle",
                    where=held.path if held is not None else None,
                    why=f"{applied.rule.label} changed the base's weights at its start, which hold only with it",
                    fix="remove it; or start it so that the base stays as it is",
                )


def _is_trained(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _is_merged(module: nn.Module, name: str) -> bool:
    held = site_state(module)
    return held is not None and held.merged is not None and name in held.merged.adapters


def _set_idle(state: ModelState, names: set[str], journal: Journal) -> None:
    before = set(state.idle)
    journal.undo(state.idle.update, before)
    journal.undo(state.idle.clear)
    state.idle.clear()
    state.idle.update(set(state.adapters) - names)


def _set_flags(tensors: Mapping[str, Tensor], rules: list[Applied], live: bool) -> None:
    """Only live adapters train."""
    for applied in rules:
        for name in applied.tensors:
            tensor = tensors.get(name)
            if tensor is None or not _is_trained(tensor):
                continue
            if live:
                tensor.requires_grad = applied.flags.pop(name, tensor.requires_grad)
            elif name not in applied.flags:
                applied.flags[name] = tensor.requires_grad
                tensor.requires_grad = False


_claim = threading.Lock()
_owners: WeakKeyDictionary[nn.Module, tuple[int, int]] = WeakKeyDictionary()
