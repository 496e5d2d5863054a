"""Switches from one set of live adapters to another, only at the sites of adapters that change.

A site caches its generated class for each set of live adapters. A model may have a thousand sites whose data is not in
the processor's cache. So the loops access only what they change, and call nothing for a site that needs no change.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.lifecycle.gradient_reducers import watch_gradients
from surgery.rewritten_model.structural_adapters import boxes_with_set_aside, check_not_structural, set_aside_rules
from surgery.state.adapter_tensors import AdapterTensors, box_of
from surgery.state.merged_tensors import merged_error
from surgery.state.records import _SITE, Applied, ModelState, SiteState, require_state
from surgery.state.running_statistics import exchange
from surgery.state.site_links import module_at
from surgery.transaction.undo_log import Journal
from surgery.weaving.class_objections import reason_against
from surgery.weaving.generated_class import swap_class
from surgery.weaving.site_class import class_of_live

__all__ = ["check_none_merged", "check_settled", "set_trained", "switch", "weights_now"]

_CLASSES = 256  # cached at a site, one for each set of live adapters
_set_class = object.__setattr__  # nn.Module's own looks for tensors first and takes twenty times as long

SettledSites = list[tuple[nn.Module, SiteState, type[nn.Module]]]  # sites with their records and the classes they have


def switch(model: nn.Module, live: Mapping[str, float]) -> None:
    """Make these adapters live with these weights, and all others idle. All or nothing.

    Adapters that have structural rules alone are always live.
    """
    state = require_state(model)
    if structural := state.structural:
        weighted = [name for name in structural if live.get(name, 1.0) != 1.0]
        check_not_structural(state, weighted, "have a weight", "make it live with weight 1")
        live = dict.fromkeys(structural, 1.0) | dict(live)
    boxes = {name: boxes_with_set_aside(model, state, name) for name in state.adapters} if state.structure else None
    before = weights_now(state)
    changed = [name for name in state.adapters if before.get(name) != live.get(name)]
    modules = dict.fromkeys(itertools.chain.from_iterable(state.places[name].modules for name in changed))
    settled, bound = _settled(modules)
    for name in changed:
        _check_change(state, name, live.get(name))

    def boxes_of(name: str) -> Sequence[AdapterTensors]:
        return state.places[name].boxes if boxes is None else boxes[name]

    with Journal() as journal:
        journal.undo(_note, state, changed, before)
        for name in changed:
            journal.undo(_restore_flags, _flags_of(boxes_of(name)))
        _note(state, changed, live)
        journal.undo(_swap_back, settled)
        _install(settled, bound, _key(state, live), lambda: state.rules_at(live))
        for path, name, without, value in state.switched:
            if (reader := module_at(model, path)) is not None:
                journal.attribute(reader, name)
                setattr(reader, name, value if live else without)
        frozen, freezes = (any(state.standing[name].freezes for name in names) for names in (before, live))
        if state.moving and frozen != freezes:
            exchange(state.moving, journal, not freezes)
        for name in changed:
            if name not in live:
                _rest(boxes_of(name))
            elif name not in before:
                _train(boxes_of(name))
                watch_gradients(name, _parameters(boxes_of(name)))


def weights_now(state: ModelState) -> dict[str, float]:
    """The live adapters with their weights."""
    return {name: standing.weight for name in state.adapters if (standing := state.standing[name]).live}


def _note(state: ModelState, changed: Iterable[str], live: Mapping[str, float]) -> None:
    for name in changed:
        standing = state.standing[name]
        standing.live, standing.weight = name in live, live.get(name, 1.0)


def _key(state: ModelState, live: Mapping[str, float]) -> frozenset[tuple[str, float]]:
    """The set of live adapters as one shared object: the key of each site's cached classes."""
    key = frozenset(live.items())
    if len(state.keys) >= _CLASSES and key not in state.keys:
        state.keys.clear()
    return state.keys.setdefault(key, key)


def _install(
    settled: SettledSites,
    bound: set[int],
    key: frozenset[tuple[str, float]],
    rules_at: Callable[[], dict[int, list[Applied]]],
) -> None:
    """Give each site the class for the live adapters; `key` has their names and weights."""
    rules: dict[int, list[Applied]] | None = None
    for module, site, before in settled:
        cached = site.classes.get(key)
        if cached is None:
            rules = rules_at() if rules is None else rules
            cached = class_of_live(module, site, live=rules.get(id(module), [])), site.woven
            if len(site.classes) >= _CLASSES:
                site.classes.clear()
            site.classes[key] = cached
        cls, site.woven = cached
        if site.variants:
            site.variants.clear()
        if cls is not before:
            if bound and id(module) in bound:
                swap_class(module, cls)
            else:
                _set_class(module, "__class__", cls)


def _swap_back(settled: SettledSites) -> None:
    for module, site, before in settled:
        if module.__class__ is not before:
            swap_class(module, before)
        site.woven = None


def _settled(modules: Iterable[nn.Module]) -> tuple[SettledSites, set[int]]:
    """`check_settled` for all sites, and the ids of those whose forward is bound on the instance."""
    settled, bound = SettledSites(), set[int]()
    generated: set[type] = set()
    for module in modules:
        own, cls = module.__dict__, module.__class__
        site: SiteState | None = own.get(_SITE)
        unwrapped = "forward" not in own and "_old_forward" not in own  # BOUND
        if not unwrapped:
            bound.add(id(module))
        if site is None or site.merged is not None or not unwrapped or (cls is not site.base and cls not in generated):
            site = check_settled(module)
            if "_surgery_recipe" in cls.__dict__:
                generated.add(cls)
        settled.append((module, site, cls))
    return settled, bound


def check_settled(module: nn.Module) -> SiteState:
    """The site's record; `SurgeryError` if the site is merged or its class can't change."""
    record: SiteState | None = module.__dict__.get(_SITE)
    if record is None:
        raise SurgeryError("a site of this model has lost its record", fix="copy models with copy.deepcopy")
    if record.merged is not None:
        raise merged_error(record.path, record.merged.adapters)
    cls = module.__class__
    if "forward" not in module.__dict__ and (cls is record.base or "_surgery_recipe" in cls.__dict__):
        return record
    refused = reason_against(module)
    if refused is not None:
        raise SurgeryError("the site's class can't change", where=record.path, why=refused[0], fix=refused[1])
    return record


def check_none_merged(state: ModelState) -> None:
    """Raise `SurgeryError` if an idle adapter is merged: its change would count although it is idle."""
    idle = state.idle
    first = [state.places[name].modules[:1] for name in idle]  # an adapter is merged at all its sites
    for module in dict.fromkeys(itertools.chain.from_iterable(first)):
        record: SiteState | None = module.__dict__.get(_SITE)
        if record is not None and record.merged is not None and not set(idle).isdisjoint(record.merged.adapters):
            check_settled(module)


def _check_change(state: ModelState, name: str, weight: float | None) -> None:
    """Raise `SurgeryError` if an adapter can't be idle (`weight` None), or can't have this weight."""
    if weight == 1.0 or (weight is None and not state.standing[name].in_base):
        return
    for module, rules in state.places[name]:
        for applied in rules:
            why = fix = None
            if applied.changed:
                why = f"{applied.rule.label} changed the base's weights at its start; they need the whole adapter"
                fix = "remove it, or use an initialisation that leaves the base unchanged"
            elif weight is not None and not applied.scalable:
                why = f"the change of {applied.rule.label} can't be multiplied by a number"
                fix = "make it live with weight 1"
            if why:
                what = f"the adapter {name!r} can't " + ("be idle" if weight is None else f"have the weight {weight}")
                raise SurgeryError(what, where=check_settled(module).path, why=why, fix=fix)


# Only live adapters train -------------------------------------------------------------------------------------


def _rest(boxes: Sequence[AdapterTensors]) -> None:
    for box in boxes:
        still = []
        for name, tensor in box._parameters.items():
            if tensor is not None:
                if tensor.requires_grad:
                    tensor.requires_grad = False
                else:
                    still.append(name)
        if still:
            box.still = frozenset(still)


def _flags_of(boxes: Sequence[AdapterTensors]) -> list[tuple[AdapterTensors, frozenset[str], list[bool]]]:
    """The state of these boxes that `_rest` and `_train` change."""
    return [(box, box.still, [t.requires_grad for t in box._parameters.values() if t is not None]) for box in boxes]


def _restore_flags(noted: list[tuple[AdapterTensors, frozenset[str], list[bool]]]) -> None:
    for box, still, flags in noted:
        if box.still != still:
            box.still = still
        for tensor, flag in zip([t for t in box._parameters.values() if t is not None], flags, strict=True):
            if tensor.requires_grad != flag:
                tensor.requires_grad = flag


def _train(boxes: Sequence[AdapterTensors]) -> None:
    for box in boxes:
        still = box.still
        for name, tensor in box._parameters.items():
            if tensor is not None and name not in still:
                tensor.requires_grad = True
        if still:
            box.still = frozenset()


def _parameters(boxes: Sequence[AdapterTensors]) -> Iterator[Tensor]:
    return (tensor for box in boxes for tensor in box._parameters.values() if tensor is not None)


def set_trained(model: nn.Module, adapters: Iterable[str], train: bool) -> None:
    """Set whether the tensors that these adapters' rules train do train while the adapters are live."""
    state = require_state(model)
    with Journal() as journal:
        for name in adapters:
            journal.undo(_restore_flags, _flags_of(boxes_with_set_aside(model, state, name)))
            for module, rules in (*state.places[name], *set_aside_rules(model, state, name)):
                names = [key for applied in rules for key in applied.trained]
                if (box := box_of(module, name)) is None:
                    continue
                if not state.standing[name].live:
                    box.still = box.still.difference(names) if train else box.still.union(names)
                    continue
                tensors = box.tensors()
                for key in names:
                    tensors[key].requires_grad_(train)
            if train and state.standing[name].live:
                watch_gradients(name, _parameters(state.places[name].boxes))
