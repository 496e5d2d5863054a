"""`remove`: takes adapters off a model and restores what they changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from surgery.arithmetic.exact_fold import Record
from surgery.errors import SiteError, SurgeryError
from surgery.forward.offloaded_weights import weights_present
from surgery.forward.parameter_view import tensor_at
from surgery.lifecycle.apply import M
from surgery.lifecycle.freezing import thaw_base
from surgery.merging.offloaded_merge import unmerge_offloaded_site
from surgery.merging.site_folding import verify_records
from surgery.patterns.offload_hooks import is_offloaded
from surgery.rewritten_model import transformers_hooks
from surgery.rewritten_model.moved_sites import unwatch
from surgery.rewritten_model.restructure import set_aside_sites, undo_edits
from surgery.rewritten_model.structure_objections import check_undoable
from surgery.rewritten_model.verb_root import rewritten, with_lost
from surgery.state.adapter_naming import adapter_names
from surgery.state.adapter_tensors import detach
from surgery.state.in_use import check_free
from surgery.state.kept_codes import KeptCodes
from surgery.state.record_undo import keep_model, keep_site, take_out_fold
from surgery.state.records import _MODEL, _SITE, ModelState, SiteState, merged_adapters, site_state
from surgery.state.restructuring import Restructuring
from surgery.state.site_links import module_at
from surgery.transaction.neutral_context import verb
from surgery.transaction.undo_log import Journal
from surgery.weaving.class_objections import reason_against
from surgery.weaving.site_class import ClassChange

__all__ = ["remove"]


@verb
def remove(model: M, adapter: str | Sequence[str] | None = None, *, check: bool = True) -> M:
    """Remove one adapter, several or all: the exact inverse of `apply_rules`.

    >>> from torch import nn
    >>> from surgery import apply_rules, remove
    >>> from surgery.rules import LoraRule
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> weight, kind = model[0].weight, type(model[0])
    >>> _ = remove(apply_rules(model, [LoraRule("0", rank=2)]))
    >>> model[0].weight is weight, type(model[0]) is kind, weight.requires_grad
    (True, True, True)

    Removing the last adapter restores the model's classes, parameters, key order and hooks. Removing the last adapter
    that freezes the base restores the base's `requires_grad` flags.

    Args:
        model: the model.
        adapter: a name, several names, or None for all adapters.
        check: whether a weight that the adapter changed at its start (PiSSA) must be unchanged since, by its checksum.
            False: subtract the change anyway, and also remove rules from modules that were replaced since.

    Returns:
        The same model object.

    Raises:
        SurgeryError: an unknown adapter, an adapter that is merged, a changed base weight, or a base weight that a
            later adapter changed at its start on top of this one. The model is unchanged.
    """
    root, state = rewritten(model, lost=not check)
    names = list(dict.fromkeys(adapter_names(state, adapter)))
    check_free(root)
    affected = list(_sites_of(root, state, names))
    for path, module, site in affected:
        _check_removable(path, module, site, names, check)
    undone = [record for record in reversed(state.structure) if record.adapter in names]
    _check_structure(root, state, undone, names)
    keys = transformers_hooks.keys_of(root, state, names)
    with Journal() as journal:
        shared, going = ClassChange(journal), frozenset(names)
        aside = {id(module) for module in set_aside_sites(root, state)}
        for _, module, site in affected:
            _take_out(module, site, going, check, shared, id(module) in aside)
        keep_model(journal, model, state)
        for name in names:
            state.forget(name)
        for record in undone:
            undo_edits(root, state, record, journal)
            state.structure.remove(record)
        thaw_base(root, state, journal)
        if not state.adapters:
            restore(root, state, journal)
        else:
            transformers_hooks.unlist(root, state, keys, journal)
    return model


def _sites_of(model: nn.Module, state: ModelState, names: Sequence[str]) -> Iterator[tuple[str, nn.Module, SiteState]]:
    """The sites of these adapters: those in the model record, and copied layers that hold the same rules."""
    placed = {id(module) for name in names for module in state.places[name].modules}
    for path, module, site in with_lost(model, state, names):
        if id(module) in placed or any(applied.adapter in names for applied in site.applied):
            yield path, module, site
    for module in set_aside_sites(model, state):
        site = site_state(module)
        if site is not None and any(applied.adapter in names for applied in site.applied):
            yield site.path, module, site


def _check_structure(root: nn.Module, state: ModelState, undone: Sequence[Restructuring], names: Sequence[str]) -> None:
    """Raise an error before any change if a structural rule can't be undone."""
    if undone and (merged := merged_adapters(root)):
        raise SurgeryError(
            "the model is merged", why=f"its weights hold {', '.join(merged)}", fix="unmerge(model) first"
        )
    check_undoable(state, undone, set(names))


def _check_removable(path: str, module: nn.Module, site: SiteState, names: list[str], check: bool) -> None:
    """Raise an error before any change if an adapter can't be removed from a site."""
    removed = [applied for _, applied in site.of(names)]
    if site.merged is not None and any(
        applied.live or applied.changed or applied.adapter in site.merged.adapters for applied in removed
    ):
        adapters = ", ".join(site.merged.adapters)
        raise SiteError(
            "the model is merged", where=path, why=f"its weights hold {adapters}", fix="unmerge(model) first"
        )
    refused = reason_against(module)
    if refused is not None:
        raise SiteError("the site's class can't be restored", where=path, why=refused[0], fix=refused[1])
    if not any([applied.changed for applied in removed]):
        return
    staying, remaining = set[str](), len(removed)
    for applied in reversed(site.applied):
        if not remaining:
            break
        remaining -= applied.adapter in names
        changed = {name for name, _ in applied.changed}
        if applied.adapter in names and changed & staying:
            above = [a for a in site.applied if a.adapter not in names and changed & {name for name, _ in a.changed}]
            raise SiteError(
                f"the adapter {applied.adapter!r} can't be removed yet",
                where=path,
                why=f"{above[-1].rule.label} [{above[-1].adapter}] changed {', '.join(changed & staying)} after it",
                fix=f"remove {above[-1].adapter!r} first",
            )
        if applied.adapter not in names:
            staying |= changed
    records = [(name, record) for applied in removed for name, record in applied.changed]
    with weights_present(module):
        folds = [(tensor_at(module, name), record) for name, record in records if isinstance(record, Record)]
        verify_records(folds, path, check)
    codes = [record for _, record in records if isinstance(record, KeptCodes)]
    if check and codes:
        codes[-1].check(module, path)


def _take_out(
    module: nn.Module, site: SiteState, names: frozenset[str], check: bool, shared: ClassChange, aside: bool
) -> None:
    """Take the adapters out of a site: their tensors, records and changes of the base.

    `aside`: a structural rule took the module out, so its class did not follow switches.
    """
    keep_site(shared.journal, module)
    removed = [applied for _, applied in site.take_out(names)]
    if aside or any([applied.live for applied in removed]):
        shared.install(module, names)
    else:
        site.classes.clear()  # a later adapter may have the same name
    for applied in reversed(removed):
        if applied.changed and is_offloaded(module):
            folds = [(name, record) for name, record in applied.changed if isinstance(record, Record)]
            unmerge_offloaded_site(module, site.path, folds, check, shared.journal)
            continue
        for name, record in reversed(applied.changed):
            if isinstance(record, KeptCodes):
                record.take_out(module, shared.journal, site.path)
            else:
                take_out_fold(shared.journal, tensor_at(module, name), record, check=check, where=site.path)
    for name in {applied.adapter for applied in removed}:
        detach(module, name)
    if not site.applied:
        del module.__dict__[_SITE]


def restore(model: nn.Module, state: ModelState, journal: Journal) -> None:
    """After the last adapter is removed: restore what the model record noted, and delete the record."""
    for path, name, value, _ in state.switched:
        if (reader := module_at(model, path)) is not None:
            journal.attribute(reader, name)
            setattr(reader, name, value)
    transformers_hooks.restore(model, state, journal)
    unwatch(model, journal)
    del model.__dict__[_MODEL]
