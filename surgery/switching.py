"""From one set of live adapters to another: at the sites of those that change alone, by classes made once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.install import BOUND, reason_against, swap
from surgery.journal import Journal
from surgery.living import class_of_live
from surgery.match import RESERVED
from surgery.state import _SITE, Applied, ModelState, SiteState, require_state, tensors_of

__all__ = ["check_none_merged", "check_settled", "set_trained", "switch", "weights_now"]

_CLASSES = 256  # kept at a site, one for each set of live adapters met
_set_class = object.__setattr__  # nn.Module's own looks for tensors first, and takes twenty times as long


def switch(model: nn.Module, live: Mapping[str, float]) -> None:
    """Make these adapters live, with these weights, and no others. All or nothing."""
    state = require_state(model)
    before = weights_now(state)
    changed = [name for name in state.adapters if before.get(name) != live.get(name)]
    places = list({id(module): module for name in changed for module, _ in state.places[name]}.values())
    held = [check_settled(module) for module in places]
    for name in changed:
        _check_change(state, name, live.get(name))
    entered = [name for name in changed if (name in before) != (name in live)]
    with Journal() as journal:
        journal.undo(_note, state, changed, before)
        _note(state, changed, live)
        swapped: list[tuple[nn.Module, type[nn.Module]]] = []
        journal.undo(_swap_back, swapped, held)
        key = frozenset(live.items())
        for module, site in zip(places, held, strict=True):
            _install(module, site, key, swapped)
        for path, name, without, value in state.switched:
            reader = model.get_submodule(path)
            journal.undo(setattr, reader, name, getattr(reader, name))
            setattr(reader, name, value if live else without)
        for name in entered:
            for module, rules in state.places[name]:
                _set_flags(module, name, rules, name in live)


def weights_now(state: ModelState) -> dict[str, float]:
    """The live adapters with their weights."""
    return {name: state.weights.get(name, 1.0) for name in state.adapters if name not in state.idle}


def set_trained(state: ModelState, adapters: Iterable[str], train: bool) -> None:
    """Whether adapters train while they are live: the tensors that their rules have for that."""
    for name in adapters:
        for module, rules in state.places[name]:
            held = tensors_of(module, name)
            for applied in rules:
                for key in applied.trained:
                    if applied.live:
                        held[key].requires_grad_(train)
                    else:
                        applied.flags[key] = train


def _note(state: ModelState, changed: Iterable[str], live: Mapping[str, float]) -> None:
    for name in changed:
        weight = live.get(name)
        (state.idle.add if weight is None else state.idle.discard)(name)
        if weight is None or weight == 1.0:
            state.weights.pop(name, None)
        else:
            state.weights[name] = weight
        for _, rules in state.places[name]:
            for applied in rules:
                applied.live, applied.weight = weight is not None, 1.0 if weight is None else weight


def _install(
    module: nn.Module,
    site: SiteState,
    key: frozenset[tuple[str, float]],
    swapped: list[tuple[nn.Module, type[nn.Module]]],
) -> None:
    found = site.classes.get(key)
    if found is None:
        found = class_of_live(module, site), site.woven
        if len(site.classes) >= _CLASSES:
            site.classes.clear()
        site.classes[key] = found
    cls, site.woven = found
    if site.variants:
        site.variants.clear()
    before = module.__class__
    if cls is not before:
        swapped.append((module, before))
        if BOUND.isdisjoint(module.__dict__):
            _set_class(module, "__class__", cls)
        else:
            swap(module, cls)


def _swap_back(swapped: list[tuple[nn.Module, type[nn.Module]]], held: Iterable[SiteState]) -> None:
    for module, before in reversed(swapped):
        swap(module, before)
    for site in held:
        site.woven = None


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
    for name in state.idle:
        for module, _ in state.places[name][:1]:  # an adapter is merged at all its sites
            held: SiteState | None = module.__dict__.get(_SITE)
            if held is not None and held.merged is not None and name in held.merged.adapters:
                check_settled(module)


def _check_change(state: ModelState, name: str, weight: float | None) -> None:
    """Whether an adapter may be idle (None), or have this weight."""
    if weight == 1.0:
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


def _set_flags(module: nn.Module, name: str, rules: list[Applied], live: bool) -> None:
    """Only live adapters train."""
    held = module._modules.get(RESERVED)
    box = held._modules.get(name) if held is not None else None
    tensors: Mapping[str, Tensor | None] = box._parameters if box is not None else {}
    for applied in rules:
        flags = applied.flags
        if live:
            for key, flag in flags.items():
                if flag and (tensor := tensors.get(key)) is not None:
                    tensor.requires_grad = True
            flags.clear()
            continue
        for key in applied.tensors:
            tensor = tensors.get(key)
            if tensor is not None and key not in flags:
                flags[key] = tensor.requires_grad
                tensor.requires_grad = False
