"""`rename_adapter` and `copy_adapter`."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

from surgery.authoring.site_facts import MARK
from surgery.authoring.structure_rule import StructureRule
from surgery.errors import SurgeryError
from surgery.lifecycle.attach import PlacedRule, attach_idle
from surgery.patterns.module_walk import RESERVED
from surgery.rewritten_model import transformers_hooks
from surgery.rewritten_model.structural_adapters import check_not_structural, set_aside_rules, warn_set_aside
from surgery.rewritten_model.verb_root import rewritten
from surgery.state.adapter_naming import adapter_names, name_problem
from surgery.state.adapter_tensors import box_of
from surgery.state.in_use import check_free, check_unclaimed
from surgery.state.record_undo import keep_model, keep_site
from surgery.state.records import Applied, ModelState, site_state
from surgery.transaction.neutral_context import verb
from surgery.transaction.undo_log import Journal
from surgery.weaving.class_objections import reason_against
from surgery.weaving.site_class import install_live

__all__ = ["check_whole", "copied_rule", "copy_adapter", "rename_adapter"]

M = TypeVar("M", bound=nn.Module)


@verb
def rename_adapter(model: M, adapter: str, new: str) -> M:
    """Rename an adapter; the model's outputs stay the same to the bit.

    >>> from torch import nn
    >>> from surgery import active, adapter_state_dict, apply_rules, rename_adapter
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2), adapter="draft")
    >>> before = model[0].adapters.draft.A
    >>> active(rename_adapter(model, "draft", "topics")), model[0].adapters.topics.A is before
    (('topics',), True)

    The tensors stay the same Parameters, so optimizers keep working. The order of adapters and keys, flags, facts,
    weight, and whether the adapter is live or merged do not change. Caches with its virtual tokens stay valid.
    Generated code names the tensors, so it is generated again, and compiled models compile again.

    Args:
        model: the model.
        adapter: the present name.
        new: the new name. If it is the present name, nothing happens.

    Returns:
        The same model object.

    Raises:
        SurgeryError: an unknown adapter, a new name that is taken or not allowed, a call inside `using` or `route`, or
            a site whose class can't change. The model is unchanged.
    """
    root, state = rewritten(model)
    old = _known_name(state, adapter)
    if new == old:
        return model
    check_unclaimed(root)
    if (problem := name_problem(state, new)) is not None:
        raise problem
    renewed = [module for module, rules in state.places[old] if _runs(module, rules)]
    for module in renewed:
        if (refused := reason_against(module)) is not None:
            site = site_state(module)
            where = site.path if site is not None else None
            raise SurgeryError("the site's class can't change", where=where, why=refused[0], fix=refused[1])
    with Journal() as journal:
        _rename(root, state, old, new, journal)
        for module in renewed:
            install_live(module, journal)
    return model


@verb
def copy_adapter(model: M, adapter: str, new: str) -> M:
    """Copy an adapter's rules and tensors into a new idle adapter.

    >>> from torch import nn
    >>> from surgery import active, apply_rules, copy_adapter
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2), adapter="a")
    >>> active(copy_adapter(model, "a", "b"))
    ('a',)
    >>> model[0].adapters.b.A.equal(model[0].adapters.a.A), model[0].adapters.b.A is model[0].adapters.a.A
    (True, False)

    The copy is idle, so the model's outputs do not change until `activate(model, "b")`. It is the last adapter in the
    order. Its tensors have the source's values, dtypes and devices, and the source's `requires_grad` flags while live.
    Gradients are not copied, nor are structural rules, which hold for the whole model. Facts about the modules are
    copied, so an example call is not needed. The source may be merged.

    Args:
        model: the model.
        adapter: the adapter to copy.
        new: the name of the copy.

    Returns:
        The same model object.

    Raises:
        SurgeryError: an unknown adapter, a new name that is taken or not allowed, an adapter that changed the base's
            weights at its start (PiSSA) or has structural rules alone, or a model in use by another thread. The model
            is unchanged.

    Warns:
        SurgeryWarning: the source is on layers that a structural rule took out; the copy is on the present ones alone.
    """
    root, state = rewritten(model)
    old = _known_name(state, adapter)
    check_free(root)
    if (problem := name_problem(state, new)) is not None:
        raise problem
    check_not_structural(state, [old], "be copied", "apply its rules to another model")
    check_whole(state, old, "be copied")
    clones: dict[int, Tensor] = {}  # by id: tensors that sites share stay shared in the copy
    placed = [copied_rule(module, applied, clones) for module, rules in state.places[old] for applied in rules]
    rules = [rule for rule in state.adapters[old] if not isinstance(rule, StructureRule)]
    attach_idle(root, new, rules, placed, [old])
    warn_set_aside(root, state, [old], new)
    return model


def check_whole(state: ModelState, adapter: str, action: str) -> None:
    """Raise `SurgeryError` if the adapter changed the base's weights, so its tensors are only a part of it."""
    for module, rules in state.places[adapter]:
        site = site_state(module)
        if site is None:
            raise SurgeryError("a site of this model has lost its record", fix="copy models with copy.deepcopy")
        for applied in rules:
            if applied.changed:
                raise SurgeryError(
                    f"the adapter {adapter!r} can't {action}",
                    where=site.path,
                    why=f"{applied.rule.label} changed the base's weights at its start and needs that change",
                    fix="use a start that leaves the base unchanged: init='kaiming', 'gaussian' or 'orthogonal'",
                )


def _known_name(state: ModelState, adapter: Any) -> str:
    if not isinstance(adapter, str):
        raise SurgeryError(f"{adapter!r} is not the name of an adapter", fix="name one adapter")
    return adapter_names(state, adapter)[0]


# Renaming -----------------------------------------------------------------------------------------------------


def _runs(module: nn.Module, rules: list[Applied]) -> bool:
    """Whether the code that runs at a site names this adapter."""
    site = site_state(module)
    if site is None:
        raise SurgeryError("a site of this model has lost its record", fix="copy models with copy.deepcopy")
    merged = site.merged.adapters if site.merged is not None else ()
    return any(applied.live and applied.adapter not in merged for applied in rules)


def _rename(model: nn.Module, state: ModelState, old: str, new: str, journal: Journal) -> None:
    """Rename an adapter in all records and containers."""
    keep_model(journal, model, state)
    keys = transformers_hooks.keys_of(model, state, [old])
    journal.keep(*[record.__dict__ for record in state.structure])
    for record in state.structure:
        record.adapter = new if record.adapter == old else record.adapter
    for module, rules in (*state.places[old], *set_aside_rules(model, state, old)):
        record, boxes = site_state(module), module._modules.get(RESERVED)
        assert record is not None
        keep_site(journal, module)
        for applied in rules:
            journal.keep(applied.__dict__)
        if boxes is not None:
            _rekey(boxes._modules, old, new)
        for applied in rules:
            applied.adapter, applied.layer = new, None  # recorded again: a rule's rewrite may use the adapter's name
        record.classes.clear()
        record.variants.clear()
    own_merges = [site.merged for module in state.places[old].modules if (site := site_state(module)) is not None]
    all_sites = state.sites() if any(own_merges) else []  # sites of other adapters that are merged with it, too
    for merged in (site.merged for module in all_sites if (site := site_state(module)) is not None):
        if merged is not None and old in merged.adapters:
            journal.keep(merged.__dict__)
            merged.adapters = tuple(new if name == old else name for name in merged.adapters)
    for named in (state.adapters, state.places, state.standing, state.resting, state.peft_fields):
        _rekey(named, old, new)
    transformers_hooks.unlist(model, state, keys, journal)
    transformers_hooks.list_on_save(model, state, new, journal)


def _rekey(mapping: dict[str, Any], old: str, new: str) -> None:
    """Rename a key of a mapping in place; the order of the keys stays."""
    if old not in mapping:
        return
    if next(reversed(mapping)) == old:  # the last key: the order stays without a rebuild
        mapping[new] = mapping.pop(old)
        return
    items = [(new if key == old else key, value) for key, value in mapping.items()]
    mapping.clear()
    mapping.update(items)


# Copying ------------------------------------------------------------------------------------------------------


def copied_rule(module: nn.Module, applied: Applied, clones: dict[int, Tensor]) -> PlacedRule:
    """A rule of the copy, with clones of its tensors and their flags."""
    box = box_of(module, applied.adapter)
    source = box.tensors() if box is not None else {}
    tensors, flags = dict[str, tuple[Tensor, bool]](), dict[str, bool]()
    for name in applied.tensors:
        tensor = source[name]
        trained = isinstance(tensor, nn.Parameter)
        if id(tensor) not in clones:
            clone = tensor.detach().clone()
            clones[id(tensor)] = nn.Parameter(clone, requires_grad=False) if trained else clone
        tensors[name] = (clones[id(tensor)], not trained)
        if trained:
            flags[name] = tensor.requires_grad if box is None or applied.live else name not in box.still
    facts = {name: copy.deepcopy(fact) for name, fact in applied.facts.items() if name != MARK}
    return PlacedRule(module, applied.rule, tensors, facts, applied.inside, flags, applied.trained)
