"""Which class a site has: its own, or one whose forward has the edits of the rules that are live on it."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass

from torch import nn

from surgery.errors import SiteError
from surgery.forward.own_forward import OwnForward, own_forward
from surgery.forward.tape import Layer
from surgery.state.records import Applied, SiteState, site_state
from surgery.transaction.undo_log import Journal
from surgery.weaving.call_variants import varied_class
from surgery.weaving.conflicts import hidden
from surgery.weaving.generated_class import generated_class, swap
from surgery.weaving.rewrite_recording import layer_of

__all__ = ["Shared", "Woven", "class_of_live", "install_live"]


@dataclass(frozen=True, eq=False)
class Woven:
    """A class, the edits in its forward, and the own forward they were made in. What is equal is one object."""

    cls: type[nn.Module]
    layers: tuple[Layer, ...] = ()
    own: OwnForward | None = None

    @staticmethod
    def of(kind: type[nn.Module], layers: tuple[Layer, ...] = (), own: OwnForward | None = None) -> Woven:
        return _known.setdefault((kind, layers, own and own.key), Woven(kind, layers, own))


def install_live(
    module: nn.Module, journal: Journal | None, own: OwnForward | None = None, live: list[Applied] | None = None
) -> None:
    """Give a site the class of the rules that are live on it (`live`, where they are known); its own where none is."""
    state = site_state(module)
    assert state is not None
    _install(module, state, class_of_live(module, state, own, live), journal)


def class_of_live(
    module: nn.Module, state: SiteState, own: OwnForward | None = None, live: list[Applied] | None = None
) -> type[nn.Module]:
    """The class of the rules that are live on a site; `live`: these, where they are known."""
    state.woven = None
    live = state.live() if live is None else live
    cls = _class_for(module, state, live, own)
    if not live:
        state.woven = Woven.of(cls)
    return cls


def _class_for(module: nn.Module, state: SiteState, live: list[Applied], own: OwnForward | None) -> type[nn.Module]:
    if not live:
        return state.base
    own = own or own_forward(module, state.base)
    layers = tuple([_layer(applied) or layer_of(applied, module, state.path, own) for applied in live])
    claiming = [applied for applied, layer in zip(live, layers, strict=True) if layer.tape.state_replacements]
    if len(claiming) > 1 and (problem := hidden(claiming, module, state.path, own)) is not None:
        raise problem
    if any([applied.inside for applied in live]):
        return varied_class(state.base, live)
    try:
        cls = generated_class(own, layers)
    except SiteError as error:  # equal edits are woven once for all their sites, so weaving knows no path
        error.where = error.where or state.path
        raise
    state.woven = Woven.of(cls, layers, own)
    return cls


def _layer(applied: Applied) -> Layer | None:
    """`layer_of` where it is there already: many live rules are gone through with each that comes."""
    return applied.layer if applied.standing.weight == 1.0 else None


def _install(module: nn.Module, state: SiteState, cls: type[nn.Module], journal: Journal | None) -> None:
    before = type(module)
    if journal is not None:
        journal.undo(_back, module, state, before)
    state.variants.clear()
    state.classes.clear()
    if cls is not before:
        swap(module, cls)


def _back(module: nn.Module, state: SiteState, before: type[nn.Module]) -> None:
    """What a class was chosen from meanwhile is not kept: a call may have made some of it under other rules."""
    state.variants.clear()
    state.classes.clear()
    if type(module) is not before:
        swap(module, before)


class Shared:
    """One change of the rules at many sites: what had the same edits before has the same after, found once for all.

    So the many rules that may be live on a site are gone through once, and those that are not live never.
    """

    def __init__(self, journal: Journal):
        self.journal = journal
        self._after: dict[tuple, tuple[Woven, OwnForward | None, Woven]] = {}  # holds what its keys are the ids of

    def install(self, module: nn.Module, change: Hashable, own: OwnForward | None = None) -> None:
        """`install_live` after a `change` that is equal where sites get or lose equal edits."""
        state = site_state(module)
        assert state is not None
        before: Woven | None = state.woven
        self.journal.attribute(state, "woven")
        if before is None or before.cls is not type(module):
            return install_live(module, self.journal, own)
        key = (id(before), id(own), change)
        found = self._after.get(key)
        if found is None:
            cls = class_of_live(module, state, own or before.own)
            if state.woven is not None:
                self._after[key] = (before, own, state.woven)
        else:
            state.woven = found[2]
            cls = state.woven.cls
        _install(module, state, cls, self.journal)


_known: weakref.WeakValueDictionary[tuple, Woven] = weakref.WeakValueDictionary()
