"""An adapter whose tensors are there already is put on its sites: no targets are looked for, and nothing is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from surgery.authoring.rule import Rule
from surgery.errors import PlanError, SiteError, SurgeryError
from surgery.forward.own_forward import own_forward
from surgery.forward.tape import Layer
from surgery.state.adapter_tensors import attach, attach_again, box_of
from surgery.state.record_undo import keep_model, keep_site
from surgery.state.records import Applied, Places, SiteState, Standing, require_state, site_state
from surgery.transaction.undo_log import Journal
from surgery.transformers_hooks import hooks
from surgery.weaving.conflicts import clashes
from surgery.weaving.generated_class import reason_against
from surgery.weaving.recording import PassedOver, Step, recorded

__all__ = ["Placed", "put"]


@dataclass
class Placed:
    """One rule at one site with its tensors: name → (tensor, is it a buffer).

    `flags`: the `requires_grad` they have while they are live, where it is not what the rule says; `trained`: which are
    to be trained, where the rule is not asked.
    """

    module: nn.Module
    rule: Rule
    tensors: Mapping[str, tuple[Tensor, bool]]
    facts: dict[str, Any] = field(default_factory=dict)
    inside: bool = False
    flags: Mapping[str, bool] = field(default_factory=dict)
    trained: tuple[str, ...] = ()


def put(
    model: nn.Module, adapter: str, rules: Sequence[Rule], placed: Iterable[Placed], sources: Iterable[str]
) -> None:
    """Give a model an idle adapter of these rules: what it computes stays what it is. All or nothing.

    It freezes the base where one of its `sources`, the adapters it is made from, does.
    Each rule is recorded at its site, by the facts that are known of it, and asked whether these are its tensors.
    """
    state = require_state(model)
    standing = Standing(live=False, freezes=any(state.standing[name].freezes for name in sources))
    with Journal() as journal:
        steps, places, tied = list[Step](), dict[int, tuple[nn.Module, list[Applied]]](), dict[Any, Tensor]()
        for one in placed:
            site = site_state(one.module)
            assert site is not None
            if (refused := reason_against(one.module)) is not None:
                what = "the site can't have another adapter"
                raise SurgeryError(what, where=site.path, why=refused[0], fix=refused[1])
            steps += _put(one, adapter, standing, site, tied, journal)
            places.setdefault(id(one.module), (one.module, []))[1].append(site.applied[-1])
        if problems := clashes(steps, beside=False):
            raise PlanError(problems)
        keep_model(journal, model, state)
        state.adapters[adapter] = tuple(rules)
        state.place(adapter, Places.of(adapter, places.values()))
        state.standing[adapter] = standing
        hooks.list_on_save(model, state, adapter, journal)


def _put(
    one: Placed, adapter: str, standing: Standing, site: SiteState, tied: dict[Any, Tensor], journal: Journal
) -> list[Step]:
    module, path = one.module, site.path
    keep_site(journal, module, (adapter,))
    if one.tensors:
        attach(module, adapter, one.tensors, path)
    applied = Applied(adapter, one.rule, standing, tensors=tuple(one.tensors), inside=one.inside, facts=one.facts)
    trained = {name: tensor.requires_grad for name, (tensor, buffer) in one.tensors.items() if not buffer}
    steps = []
    if not one.inside:  # else it is recorded for each kind of call
        own = own_forward(module, site.base)
        try:
            made = recorded(one.rule, module, path, adapter, own, facts=one.facts)
        except PassedOver:
            raise SiteError(f"{one.rule.label} finds nothing to do here", where=path) from None
        wanted = {spec.name: spec.shape for spec in made.specs}
        found = {name: tuple(tensor.shape) for name, (tensor, _) in one.tensors.items()}
        if wanted != found:
            raise SurgeryError(f"{one.rule.label} asks for {wanted}, and is given {found}", where=path)
        for spec in made.specs:
            if (tie := spec.tie(one.rule)) is not None:
                attach_again(module, adapter, spec.name, tied.setdefault(tie, one.tensors[spec.name][0]))
        applied.layer = Layer(adapter, one.rule.label, made.tape)
        trained = {spec.name: spec.trainable for spec in made.specs if not spec.buffer}
        steps.append(Step(one.rule, path, module, (), made.own, made.tape, made.specs, False, one.facts))
    applied.trained = one.trained or tuple(name for name, flag in trained.items() if flag)
    box = box_of(module, adapter)
    if box is not None:
        box.still |= {name for name, flag in trained.items() if not one.flags.get(name, flag)}
    for tensor, buffer in one.tensors.values():
        if not buffer:
            tensor.requires_grad_(False)
    site.applied.append(applied)
    return steps
