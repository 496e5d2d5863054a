"""Gives a site its class: the module's own class, or a generated class with the live rules' edits in its forward."""

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
from surgery.weaving.call_variants import variant_class
from surgery.weaving.conflicts import find_hidden_rule, find_live_conflict
from surgery.weaving.generated_class import generated_class, swap_class
from surgery.weaving.rewrite_recording import layer_of

__all__ = ["ClassChange", "WovenClass", "class_of_live", "install_live"]


@dataclass(frozen=True, eq=False)
class WovenClass:
    """A site's class, the edits in its forward, and the own forward of the site. Equal ones are one object."""

    cls: type[nn.Module]
    layers: tuple[Layer, ...] = ()
    own: OwnForward | None = None

    @staticmethod
    def of(kind: type[nn.Module], layers: tuple[Layer, ...] = (), own: OwnForward | None = None) -> WovenClass:
        return _woven_classes.setdefault((kind, layers, own and own.key), WovenClass(kind, layers, own))


def install_live(
    module: nn.Module, journal: Journal | None, own: OwnForward | None = None, live: list[Applied] | None = None
) -> None:
    """Give a site the class of its live rules, or the module's own class without live rules.

    `live`: the live rules, if the caller knows them.
    """
    state = site_state(module)
    assert state is not None
    _install(module, state, class_of_live(module, state, own, live), journal)


def class_of_live(
    module: nn.Module, state: SiteState, own: OwnForward | None = None, live: list[Applied] | None = None
) -> type[nn.Module]:
    """Returns the class of a site with its live rules. `live`: the live rules, if the caller knows them."""
    state.woven = None
    live = state.live() if live is None else live
    cls = _class_for(module, state, live, own)
    if not live:
        state.woven = WovenClass.of(cls)
    return cls


def _class_for(module: nn.Module, state: SiteState, live: list[Applied], own: OwnForward | None) -> type[nn.Module]:
    if not live:
        return state.base
    own = own or own_forward(module, state.base)
    layers = tuple([_cached_layer(applied) or layer_of(applied, module, state.path, own) for applied in live])
    replacing = [applied for applied, layer in zip(live, layers, strict=True) if layer.tape.state_replacements]
    if len(replacing) > 1 and (problem := find_live_conflict(replacing, module, state.path, own)) is not None:
        raise problem
    if len(live) > 1 and (problem := find_hidden_rule(live, state.path)) is not None:
        raise problem
    if any([applied.inside for applied in live]):
        return variant_class(state.base, live)
    try:
        cls = generated_class(own, layers)
    except SiteError as error:  # equal edits are woven once for many sites, so weaving does not know a path
        error.where = error.where or state.path
        raise
    state.woven = WovenClass.of(cls, layers, own)
    return cls


def _cached_layer(applied: Applied) -> Layer | None:
    """Returns the recorded edits of a rule with weight 1. A fast path, because a site may have many live rules."""
    return applied.layer if applied.standing.weight == 1.0 else None


def _install(module: nn.Module, state: SiteState, cls: type[nn.Module], journal: Journal | None) -> None:
    before = type(module)
    if journal is not None:
        journal.undo(_restore_class, module, state, before)
    state.variants.clear()
    state.classes.clear()
    if cls is not before:
        swap_class(module, cls)


def _restore_class(module: nn.Module, state: SiteState, before: type[nn.Module]) -> None:
    """Restore a site's former class. Its caches are cleared, because a call may have filled them for other rules."""
    state.variants.clear()
    state.classes.clear()
    if type(module) is not before:
        swap_class(module, before)


class ClassChange:
    """One change of the rules at many sites. Sites with the same class before the change share the class after it.

    The new class is computed once for each class before, so a site's other live rules are not visited again.
    """

    def __init__(self, journal: Journal):
        self.journal = journal
        # The keys contain ids, so the values hold the objects with these ids.
        self._after: dict[tuple, tuple[WovenClass, OwnForward | None, WovenClass]] = {}

    def install(self, module: nn.Module, change: Hashable, own: OwnForward | None = None) -> None:
        """Call `install_live` for a site. `change` must be equal for sites that get or lose equal edits."""
        state = site_state(module)
        assert state is not None
        before: WovenClass | None = state.woven
        self.journal.attribute(state, "woven")
        if before is None or before.cls is not type(module):
            return install_live(module, self.journal, own)
        key = (id(before), id(own), change)
        outcome = self._after.get(key)
        if outcome is None:
            cls = class_of_live(module, state, own or before.own)
            if state.woven is not None:
                self._after[key] = (before, own, state.woven)
        else:
            state.woven = outcome[2]
            cls = state.woven.cls
        _install(module, state, cls, self.journal)


_woven_classes: weakref.WeakValueDictionary[tuple, WovenClass] = weakref.WeakValueDictionary()
