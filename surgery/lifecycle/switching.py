"""From one set of live adapters to another: at the sites of those that change alone, by classes made once.

There may be a thousand sites, and what lies at them is in no cache of the processor by the time another adapter is
wanted. So the loops here go straight to what they change, and call nothing for a site that is as it should be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.lifecycle.gradient_reducers import watch_gradients
from surgery.state.adapter_tensors import AdapterTensors, box_of
from surgery.state.records import _SITE, Applied, ModelState, SiteState, require_state
from surgery.state.running_statistics import exchange
from surgery.state.site_links import there
from surgery.transaction.undo_log import Journal
from surgery.weaving.generated_class import reason_against, swap
from surgery.weaving.site_class import class_of_live

__all__ = ["check_none_merged", "check_settled", "set_trained", "switch", "weights_now"]

_CLASSES = 256  # kept at a site, one for each set of live adapters met
_set_class = object.__setattr__  # nn.Module's own looks for tensors first, and takes twenty times as long

Found = list[tuple[nn.Module, SiteState, type[nn.Module]]]  # sites with their records and the classes they have


def switch(model: nn.Module, live: Mapping[str, float]) -> None:
    """Make these adapters live, with these weights, and no others. All or nothing."""
    state = require_state(model)
    before = weights_now(state)
    changed = [name for name in state.adapters if before.get(name) != live.get(name)]
    modules = dict.fromkeys(itertools.chain.from_iterable(state.places[name].modules for name in changed))
    found, bound = _settled(modules)
    for name in changed:
        _check_change(state, name, live.get(name))
    with Journal() as journal:
        journal.undo(_note, state, changed, before)
        for name in changed:
            journal.undo(_put_back, _noted(state.places[name].boxes))
        _note(state, changed, live)
        journal.undo(_swap_back, found)
        _install(found, bound, _key(state, live), lambda: state.rules_at(live))
        for path, name, without, value in state.switched:
            if (reader := there(model, path)) is not None:
                journal.attribute(reader, name)
                setattr(reader, name, value if live else without)
        frozen, freezes = (any(state.standing[name].freezes for name in names) for names in (before, live))
        if state.moving and frozen != freezes:
            exchange(state.moving, journal, not freezes)
        for name in changed:
            if name not in live:
                _rest(state.places[name].boxes)
            elif name not in before:
                _train(state.places[name].boxes)
                watch_gradients(name, _parameters(state.places[name].boxes))


def weights_now(state: ModelState) -> dict[str, float]:
    """The live adapters with their weights."""
    return {name: standing.weight for name in state.adapters if (standing := state.standing[name]).live}


def _note(state: ModelState, changed: Iterable[str], live: Mapping[str, float]) -> None:
    for name in changed:
        standing = state.standing[name]
        standing.live, standing.weight = name in live, live.get(name, 1.0)


def _key(state: ModelState, live: Mapping[str, float]) -> frozenset[tuple[str, float]]:
    """The set of live adapters as one object, by which sites find their class."""
    key = frozenset(live.items())
    if len(state.keys) >= _CLASSES and key not in state.keys:
        state.keys.clear()
    return state.keys.setdefault(key, key)


def _install(
    found: Found,
    bound: set[int],
    key: frozenset[tuple[str, float]],
    rules_at: Callable[[], dict[int, list[Applied]]],
) -> None:
    rules: dict[int, list[Applied]] | None = None
    for module, site, before in found:
        known = site.classes.get(key)
        if known is None:
            rules = rules_at() if rules is None else rules
            known = class_of_live(module, site, live=rules.get(id(module), [])), site.woven
            if len(site.classes) >= _CLASSES:
                site.classes.clear()
            site.classes[key] = known
        cls, site.woven = known
        if site.variants:
            site.variants.clear()
        if cls is not before:
            if bound and id(module) in bound:
                swap(module, cls)
            else:
                _set_class(module, "__class__", cls)


def _swap_back(found: Found) -> None:
    for module, site, before in found:
        if module.__class__ is not before:
            swap(module, before)
        site.woven = None


def _settled(modules: Iterable[nn.Module]) -> tuple[Found, set[int]]:
    """`check_settled` of all; and which have a forward bound on the instance, by their ids."""
    found, bound = Found(), set[int]()
    generated: set[type] = set()
    for module in modules:
        own, cls = module.__dict__, module.__class__
        site: SiteState | None = own.get(_SITE)
        plain = "forward" not in own and "_old_forward" not in own  # BOUND
        if not plain:
            bound.add(id(module))
        if site is None or site.merged is not None or not plain or (cls is not site.base and cls not in generated):
            site = check_settled(module)
            if "_surgery_recipe" in cls.__dict__:
                generated.add(cls)
        found.append((module, site, cls))
    return found, bound


def check_settled(module: nn.Module) -> SiteState:
    """The site's record; `SurgeryError` where it is merged, or can't be given another class."""
    held: SiteState | None = module.__dict__.get(_SITE)
    if held is None:
        raise SurgeryError("a site of this model has lost its record", fix="copy models with copy.deepcopy")
    if held.merged is not None:
        why = f"its weights hold {', '.join(held.merged.adapters)}"
        raise SurgeryError("the model is merged", where=held.path, why=why, fix="unmerge(model) first")
    cls = module.__class__
    if "forward" not in module.__dict__ and (cls is held.base or "_surgery_recipe" in cls.__dict__):
        return held
    refused = reason_against(module)
    if refused is not None:
        raise SurgeryError("the site can't be given another class", where=held.path, why=refused[0], fix=refused[1])
    return held


def check_none_merged(state: ModelState) -> None:
    """`SurgeryError` where the base's weights hold an adapter that is not live, and so would count all the same."""
    idle = state.idle
    first = [state.places[name].modules[:1] for name in idle]  # an adapter is merged at all its sites
    for module in dict.fromkeys(itertools.chain.from_iterable(first)):
        held: SiteState | None = module.__dict__.get(_SITE)
        if held is not None and held.merged is not None and not set(idle).isdisjoint(held.merged.adapters):
            check_settled(module)


def _check_change(state: ModelState, name: str, weight: float | None) -> None:
    """Whether an adapter may be idle (None), or have this weight."""
    if weight == 1.0 or (weight is None and not state.standing[name].in_base):
        return
    for module, rules in state.places[name]:
        for applied in rules:
            why = fix = None
            if applied.changed:
                why = f"{applied.rule.label} changed the base's weights at its start, which hold only with all of it"
                fix = "remove it; or start it so that the base stays as it is"
            elif weight is not None and not applied.scalable:
                why = f"what {applied.rule.label} changes is nothing that can be multiplied"
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


def _noted(boxes: Sequence[AdapterTensors]) -> list[tuple[AdapterTensors, frozenset[str], list[bool]]]:
    """What `_rest` and `_train` change at these."""
    return [(box, box.still, [t.requires_grad for t in box._parameters.values() if t is not None]) for box in boxes]


def _put_back(noted: list[tuple[AdapterTensors, frozenset[str], list[bool]]]) -> None:
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


def set_trained(state: ModelState, adapters: Iterable[str], train: bool) -> None:
    """Whether adapters train while they are live: the tensors that their rules have for that."""
    with Journal() as journal:
        for name in adapters:
            journal.undo(_put_back, _noted(state.places[name].boxes))
            for module, rules in state.places[name]:
                names = [key for applied in rules for key in applied.trained]
                if (box := box_of(module, name)) is None:
                    continue
                if not state.standing[name].live:
                    box.still = box.still.difference(names) if train else box.still.union(names)
                    continue
                held = box.tensors()
                for key in names:
                    held[key].requires_grad_(train)
            if train and state.standing[name].live:
                watch_gradients(name, _parameters(state.places[name].boxes))
