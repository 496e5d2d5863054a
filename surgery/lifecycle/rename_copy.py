"""Adapters under other names, and copies of them."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

from surgery.authoring.site_facts import MARK
from surgery.errors import SurgeryError
from surgery.lifecycle.attach import Placed, put
from surgery.model_record.verb_root import rewritten
from surgery.patterns.module_walk import RESERVED
from surgery.state.adapter_tensors import box_of
from surgery.state.in_use import check_free, check_unclaimed
from surgery.state.record_undo import keep_model, keep_site
from surgery.state.records import Applied, ModelState, adapter_names, name_problem, site_state
from surgery.transaction.neutral_context import verb
from surgery.transaction.undo_log import Journal
from surgery.transformers_hooks import hooks
from surgery.weaving.generated_class import reason_against
from surgery.weaving.site_class import install_live

__all__ = ["check_whole", "copy_adapter", "rename_adapter"]

M = TypeVar("M", bound=nn.Module)


@verb
def rename_adapter(model: M, adapter: str, new: str) -> M:
    """Give an adapter another name; the same model comes back, and computes the same to the bit.

    >>> from torch import nn
    >>> from surgery import active, adapter_state_dict, apply_rules, rename_adapter
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2), adapter="draft")
    >>> before = model[0].adapters.draft.A
    >>> active(rename_adapter(model, "draft", "topics")), model[0].adapters.topics.A is before
    (('topics',), True)

    Its tensors are the same Parameters, so optimizers go on; the order of adapters and keys, flags, facts, whether it
    is live, with which weight, and whether it is merged stay. A cache that holds its virtual tokens is known again.
    Generated code names its tensors and is made anew at its sites, so compiled models compile again.

    All or nothing. Raises `SurgeryError` for an unknown adapter, a name that is taken or can't be one, inside of
    `using` and `route`, and where a site can't be given another class. The same name: nothing happens.
    """
    root, state = rewritten(model)
    old = _one(state, adapter)
    if new == old:
        return model
    check_unclaimed(root)
    if (problem := name_problem(state, new)) is not None:
        raise problem
    renewed = [module for module, rules in state.places[old] if _runs(module, rules)]
    for module in renewed:
        if (refused := reason_against(module)) is not None:
            held = site_state(module)
            where = held.path if held is not None else None
            raise SurgeryError("the site can't be given another class", where=where, why=refused[0], fix=refused[1])
    with Journal() as journal:
        _rename(root, state, old, new, journal)
        for module in renewed:
            install_live(module, journal)
    return model


@verb
def copy_adapter(model: M, adapter: str, new: str) -> M:
    """Give a model a second adapter of the same rules and tensors, which goes its own way; the same model comes back.

    >>> from torch import nn
    >>> from surgery import active, apply_rules, copy_adapter
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2), adapter="a")
    >>> active(copy_adapter(model, "a", "b"))
    ('a',)
    >>> model[0].adapters.b.A.equal(model[0].adapters.a.A), model[0].adapters.b.A is model[0].adapters.a.A
    (True, False)

    The copy is idle, so that the model computes what it did: `activate(model, "b")` makes it live. Its tensors have
    the values, dtypes and devices of the other's, and will have its `requires_grad` flags when they are live; gradients
    are not copied. Nothing is initialised, and what was found out about the modules is copied, so no example is needed.
    It is the last in the order. May be done while the other is merged.

    All or nothing. Raises `SurgeryError` for an unknown adapter, a name that is taken or can't be one, for an adapter
    that changed the base's weights at its start (PiSSA), and while others use the model.
    """
    root, state = rewritten(model)
    old = _one(state, adapter)
    check_free(root)
    if (problem := name_problem(state, new)) is not None:
        raise problem
    check_whole(state, old, "be copied")
    made: dict[int, Tensor] = {}  # tensors that serve several sites serve several of the copy's
    placed = [_copied(module, applied, made) for module, rules in state.places[old] for applied in rules]
    put(root, new, state.adapters[old], placed, [old])
    return model


def check_whole(state: ModelState, adapter: str, done: str) -> None:
    """`SurgeryError` where an adapter's tensors are not all of it: a part is in the base's weights."""
    for module, rules in state.places[adapter]:
        held = site_state(module)
        if held is None:
            raise SurgeryError("a site of this model has lost its record", fix="copy models with copy.deepcopy")
        for applied in rules:
            if applied.changed:
                raise SurgeryError(
                    f"the adapter {adapter!r} can't {done}",
                    where=held.path,
                    why=f"{applied.rule.label} changed the base's weights at its start, and holds with that alone",
                    fix="start it so that the base stays as it is: init='kaiming', 'gaussian' or 'orthogonal'",
                )


def _one(state: ModelState, adapter: Any) -> str:
    if not isinstance(adapter, str):
        raise SurgeryError(f"{adapter!r} is no adapter's name", fix="name one adapter")
    return adapter_names(state, adapter)[0]


# Renaming -----------------------------------------------------------------------------------------------------


def _runs(module: nn.Module, rules: list[Applied]) -> bool:
    """Whether the code that runs at a site names this adapter."""
    held = site_state(module)
    if held is None:
        raise SurgeryError("a site of this model has lost its record", fix="copy models with copy.deepcopy")
    merged = held.merged.adapters if held.merged is not None else ()
    return any(applied.live and applied.adapter not in merged for applied in rules)


def _rename(model: nn.Module, state: ModelState, old: str, new: str, journal: Journal) -> None:
    keep_model(journal, model, state)
    keys = hooks.keys_of(model, state, [old])
    for module, rules in state.places[old]:
        held, boxes = site_state(module), module._modules.get(RESERVED)
        assert held is not None
        keep_site(journal, module)
        for applied in rules:
            journal.keep(applied.__dict__)
        if boxes is not None:
            _rekey(boxes._modules, old, new)
        for applied in rules:
            applied.adapter, applied.layer = new, None  # recorded anew: a rule may have written its name down
        held.classes.clear()
        held.variants.clear()
    here = [site.merged for module in state.places[old].modules if (site := site_state(module)) is not None]
    everywhere = state.sites() if any(here) else []  # those of others that are merged with it, too
    for merged in (site.merged for module in everywhere if (site := site_state(module)) is not None):
        if merged is not None and old in merged.adapters:
            journal.keep(merged.__dict__)
            merged.adapters = tuple(new if name == old else name for name in merged.adapters)
    for named in (state.adapters, state.places, state.standing, state.resting):
        _rekey(named, old, new)
    hooks.unlist(model, state, keys, journal)
    hooks.list_on_save(model, state, new, journal)


def _rekey(mapping: dict[str, Any], old: str, new: str) -> None:
    """The same mapping, in its order, with another key."""
    if old not in mapping:
        return
    if next(reversed(mapping)) == old:  # none comes after it
        mapping[new] = mapping.pop(old)
        return
    items = [(new if key == old else key, value) for key, value in mapping.items()]
    mapping.clear()
    mapping.update(items)


# Copying ------------------------------------------------------------------------------------------------------


def _copied(module: nn.Module, applied: Applied, made: dict[int, Tensor]) -> Placed:
    box = box_of(module, applied.adapter)
    held = box.tensors() if box is not None else {}
    tensors, flags = dict[str, tuple[Tensor, bool]](), dict[str, bool]()
    for name in applied.tensors:
        tensor = held[name]
        trained = isinstance(tensor, nn.Parameter)
        if id(tensor) not in made:
            clone = tensor.detach().clone()
            made[id(tensor)] = nn.Parameter(clone, requires_grad=False) if trained else clone
        tensors[name] = (made[id(tensor)], not trained)
        if trained:
            flags[name] = tensor.requires_grad if box is None or applied.live else name not in box.still
    facts = {name: copy.deepcopy(fact) for name, fact in applied.facts.items() if name != MARK}
    return Placed(module, applied.rule, tensors, facts, applied.inside, flags, applied.trained)
