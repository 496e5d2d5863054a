"""`forget`: makes a merge final, so the weights keep the folds and the merged adapters are removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from surgery.errors import MergeError, SurgeryError
from surgery.lifecycle.freezing import thaw_base
from surgery.lifecycle.remove import restore
from surgery.patterns.wrappers import submodule
from surgery.rewritten_model import transformers_hooks
from surgery.rewritten_model.structural_adapters import check_none_set_aside
from surgery.rewritten_model.verb_root import rewritten
from surgery.state.adapter_tensors import detach
from surgery.state.in_use import check_free
from surgery.state.merged_tensors import unguard_merged
from surgery.state.record_undo import keep_model, keep_site
from surgery.state.records import _SITE, ModelState, Sites, SiteState, base_parameters, sites
from surgery.state.running_statistics import forget_statistics, keep_statistics
from surgery.state.tied_weights import Untied
from surgery.transaction.neutral_context import verb
from surgery.transaction.undo_log import Journal

__all__ = ["forget", "forget_adapters", "untied_flags"]

M = TypeVar("M", bound=nn.Module)


@verb
def forget(model: M) -> M:
    """Make a merge final: remove the merged adapters and keep their changes in the weights.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, forget, merge
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2, init="random"))
    >>> x = torch.ones(1, 8)
    >>> adapted, _ = model(x), merge(model)
    >>> plain = forget(model)
    >>> torch.allclose(plain(x), adapted, atol=1e-6), list(plain.state_dict())
    (True, ['0.weight', '0.bias'])

    The records for `unmerge` are deleted, so `forget` has no inverse. Adapters that are not merged stay. If none stays,
    classes, hooks and `requires_grad` flags are restored as by `remove`. Weights that the merge untied (`untie=True`)
    stay untied, and a transformers config keeps saying so.

    Returns:
        The same model object.

    Raises:
        SurgeryError: nothing is merged.
        SurgeryError: a merged adapter has structural rules, too, or one took a layer of a merged adapter out; `commit`
            makes both final.
        MergeError: a remaining adapter changed, at its start (PiSSA), a weight that has a fold. After an error the
            model is unchanged.

    PEFT: `merge_and_unload`.
    """
    root, state = rewritten(model)
    check_free(root)
    merged_sites = [(path, module, site) for path, module, site in sites(root) if site.merged is not None]
    if not merged_sites:
        raise SurgeryError("nothing is merged", fix="merge(model) first; remove(model) takes adapters off unmerged")
    merged = {name for _, _, site in merged_sites for name in _names(site)}
    names = [name for name in state.adapters if name in merged]
    check_none_set_aside(root, state, names, "be forgotten")
    _check_structure(state, names)
    changing = {name for name, standing in state.standing.items() if standing.in_base and name not in merged}
    for path, _, site in merged_sites if changing else ():
        _check(path, site, changing)
    with Journal() as journal:
        forget_adapters(root, state, names, merged_sites, untied_flags(root, state), journal)
    return model


def forget_adapters(
    root: nn.Module, state: ModelState, names: Sequence[str], forgotten: Sites, flags: dict[str, bool], journal: Journal
) -> None:
    """Take adapters off the record and their sites, which keep what they compute.

    Args:
        root: the model.
        state: its record.
        names: the adapters.
        forgotten: their sites. All adapters that are merged there are among the names.
        flags: `requires_grad` of parameters that came to the base, by name.
        journal: notes the changes.
    """
    keys = transformers_hooks.keys_of(root, state, names)
    keep_model(journal, root, state)
    for _, module, site in forgotten:
        keep_site(journal, module)
        adapters = {applied.adapter for _, applied in site.take_out(names)}
        site.merged = None
        site.classes.clear()  # a later adapter may have the same name
        for name in adapters:
            detach(module, name)
        if not site.applied:
            del module.__dict__[_SITE]
    for name in names:
        state.forget(name)
    state.flags |= flags
    state.untied, state.unquantised = Untied(), []
    unguard_merged(root, journal)
    forget_statistics(root, state.moving, journal)  # those with the forgotten adapters are now the base's
    state.moving = keep_statistics(root, journal) if state.freezing else []
    thaw_base(root, state, journal)
    if state.adapters:
        transformers_hooks.unlist(root, state, keys, journal)
    else:
        restore(root, state, journal)


def untied_flags(root: nn.Module, state: ModelState) -> dict[str, bool]:
    """The `requires_grad` flags of untied parameters: the flag noted for the parameter that each was tied to."""
    untied = [
        (module.get_parameter(name), before)
        for _, module, site in sites(root)
        if site.merged is not None
        for name, before in site.merged.tied.items()
    ]
    untied += [(submodule(root, path).get_parameter(name), before) for path, name, before in state.untied.parameters]
    noted, names_by_id = state.flags, dict[int, list[str]]()
    for name, parameter in base_parameters(root):
        names_by_id.setdefault(id(parameter), []).append(name)
    names = {id(before): names_by_id.get(id(before), []) for _, before in untied}
    for own, before in untied:
        names[id(before)] = [*names[id(before)], *names_by_id[id(own)]]
    flags: dict[str, bool] = {}
    for aliases in names.values():
        flag = next((noted[name] for name in aliases if name in noted), None)
        flags |= {} if flag is None else dict.fromkeys(aliases, flag)
    return flags


def _check_structure(state: ModelState, names: Sequence[str]) -> None:
    """Raise `SurgeryError` if one of these adapters has structural rules: their records would lose their adapter."""
    for record in state.structure:
        if record.adapter in names:
            raise SurgeryError(
                f"the merge of {record.adapter!r} can't be made final alone",
                why=f"its {record.rule.label} changed the structure of the model, which a merge leaves as it is",
                fix=f"commit(model, {record.adapter!r}) makes both final",
            )


def _names(site: SiteState) -> tuple[str, ...]:
    return site.merged.adapters if site.merged is not None else ()


def _check(path: str, site: SiteState, changing: set[str]) -> None:
    assert site.merged is not None
    folded = set(site.merged.tensors)
    for _, applied in site.of(changing):
        if folded & {name for name, _ in applied.changed}:
            raise MergeError(
                f"the merge of {', '.join(site.merged.adapters)} can't be final",
                where=path,
                why=f"{applied.rule.label} [{applied.adapter}], which stays, changed a weight that it was folded into",
                fix=f"unmerge(model), then remove {applied.adapter!r}, or merge it, too",
            )
