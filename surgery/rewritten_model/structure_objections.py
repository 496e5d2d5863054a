"""Why the edits of structural rules can't be undone now, or can't exchange a tensor."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from surgery.errors import SurgeryError, abbreviate
from surgery.forward.parameter_view import tensor_at
from surgery.model_edits.table_edit import TableEdit
from surgery.patterns.module_walk import base_modules
from surgery.rewritten_model.resized_embeddings import check_resizable
from surgery.state.records import ModelState, site_state
from surgery.state.restructuring import Restructuring

__all__ = ["check_exchanged", "check_undoable"]


def check_undoable(state: ModelState, undone: Sequence[Restructuring], leaving: set[str]) -> None:
    """Raise `SurgeryError` if structural rules can't be undone now, the last first.

    `leaving`: the adapters that are removed with them.
    """
    last: dict[tuple[int, str, str], TableEdit] = {}
    for record in reversed(undone):
        last |= {key: edit for edit in record.edits for key in edit.keys}
    changed = {id(edit): edit for edit in last.values() if not (edit.in_place or _is_reloaded(edit))}
    for record in undone:
        later = state.structure[state.structure.index(record) + 1 :]
        above = [other for other in later if other not in undone and other.keys & record.keys]
        if above or any(id(edit) in changed for edit in record.edits):
            names = ", ".join(dict.fromkeys(f"{other.rule.label} [{other.adapter}]" for other in above))
            raise SurgeryError(
                f"{record.rule.label} [{record.adapter}] can't be undone",
                where=abbreviate([path or "(the model)" for path, *_ in record.steps]),
                why=f"{names} changed it since" if names else "other code changed the modules or the config since",
                fix=f"remove {above[-1].adapter!r} first" if above else "put back what was there",
            )
        _check_later_adapters(state, record, leaving)
        check_exchanged(state.sites(), record, leaving)
        names = list(state.adapters)
        after = [name for name in names[names.index(record.adapter) + 1 :] if name not in leaving]
        for owner, name, old, new in record.resized:
            if name == "weight":
                check_resizable(owner, old.shape[0], leaving, after if old.shape < new.shape else ())


def check_exchanged(sites_present: Sequence[nn.Module], record: Restructuring, leaving: Collection[str] = ()) -> None:
    """Raise `SurgeryError` if an adapter's change is in a tensor that the edits exchange: its record is of that tensor.

    `leaving`: adapters that are removed before.
    """
    places = {(id(owner), name) for owner, name, *_ in record.exchanged}
    tensors = {id(tensor) for _, _, old, new in record.exchanged for tensor in (old, new)}
    for module in sites_present if places else ():
        site = site_state(module)
        assert site is not None
        changes = [(applied.adapter, name) for applied in site.applied for name, _ in applied.changed]
        folds = [(site.merged.adapters[0], name) for name in site.merged.tensors] if site.merged is not None else []
        for adapter, name in (*changes, *folds):
            if adapter not in leaving and ((id(module), name) in places or id(tensor_at(module, name)) in tensors):
                raise SurgeryError(
                    f"{record.rule.label} can't exchange the {name} now",
                    where=site.path,
                    why=f"the adapter {adapter!r} changed it, and the record of that is for the present tensor",
                    fix=f"remove {adapter!r} first, or unmerge",
                )


def _is_reloaded(edit: TableEdit) -> bool:
    """Whether an edit gave tensors other rows, and the model has other tensors of that size now.

    `load_state_dict(assign=True)` puts new tensors into a model. Their rows go back into the former ones.
    """
    if edit.table not in ("_parameters", "_buffers") or edit.before.keys() != edit.after.keys():
        return False
    table = getattr(edit.owner, edit.table)
    for name, after in edit.after.items():
        before, present = edit.before[name], table.get(name)
        if before is None or after is None or present is None or not before.shape != after.shape == present.shape:
            return False
    return True


def _check_later_adapters(state: ModelState, record: Restructuring, leaving: set[str]) -> None:
    """Raise `SurgeryError` if a later adapter has tensors on a layer that goes when the record is undone."""
    present = {id(module) for module in record.modules_of("before")}
    gone = [module for module in record.modules_of("after") if id(module) not in present]
    order = list(state.adapters)
    inherited = {*order[: order.index(record.adapter)]}  # those that the layers had when they were copied
    adapters: dict[str, str] = {}
    for module in gone:
        for _, below in base_modules(module):
            if (site := site_state(below)) is not None:
                for applied in site.applied:
                    if applied.adapter not in inherited and applied.adapter not in leaving:
                        adapters.setdefault(applied.adapter, site.path)
    if adapters:
        name, path = next(iter(adapters.items()))
        raise SurgeryError(
            f"{record.rule.label} [{record.adapter}] can't be undone",
            where=path,
            why=f"the adapter {name!r} has tensors on a layer that would go",
            fix=f"save and remove {name!r} first",
        )
