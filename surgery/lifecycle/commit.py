"""`commit`: makes adapters final, so the model is ordinary modules, as if it had been written so."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from surgery.errors import PlanError, SurgeryError, SurgeryWarning, abbreviate
from surgery.lifecycle.commit_objections import CommittedSite, find_objections
from surgery.lifecycle.forget import forget_adapters, untied_flags
from surgery.lifecycle.module_replacement import replace_modules
from surgery.merging.merge_settings import MergeSettings
from surgery.merging.offloaded_merge import merge_offloaded_site
from surgery.merging.site_folding import fold_together
from surgery.merging.site_merge import merge_site
from surgery.model_edits.shared_copies import separate_copies
from surgery.patterns.module_class import class_of
from surgery.patterns.offload_hooks import is_offloaded
from surgery.rewritten_model.verb_root import records_in, rewritten
from surgery.state.adapter_naming import adapter_names
from surgery.state.in_use import check_unclaimed
from surgery.state.parameter_owners import Owners
from surgery.state.record_undo import keep_model
from surgery.state.records import ModelState
from surgery.state.restructuring import Restructuring
from surgery.transaction.neutral_context import verb
from surgery.transaction.undo_log import Journal
from surgery.weaving.site_class import install_live

__all__ = ["commit"]

M = TypeVar("M", bound=nn.Module)


@verb
def commit(model: M, adapter: str | Sequence[str] | None = None) -> M:
    """Make adapters final: what they do becomes ordinary modules, weights and configuration. It has no inverse.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, commit
    >>> from surgery.rules import DropRule, LoraRule, ReplaceRule
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Tanh(), nn.Linear(4, 2))
    >>> rules = [DropRule("2"), ReplaceRule("1", by="torch.nn.GELU"), LoraRule("0", rank=2, init="random")]
    >>> x = torch.ones(1, 4)
    >>> adapted = apply_rules(model, rules)(x)
    >>> commit(model)
    Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
      (1): GELU(approximate='none')
      (2): Linear(in_features=4, out_features=2, bias=True)
    )
    >>> torch.allclose(model(x), adapted, atol=1e-6), list(model.state_dict())
    (True, ['0.weight', '0.bias', '2.weight', '2.bias'])

    - Structural rules stay as they are, and `remove` can't undo them any more. Layers that were taken out are released,
      with their adapters. Copies of layers that share weights get weights of their own in a model with
      `save_pretrained`, because its checkpoints can't tie them; in other models they stay shared.
    - Rules that `merge` takes are folded into the weights, as `merge` and `forget` do. Dropout is for training alone
      and is not kept.
    - The module that a ReplaceRule put in a module's place becomes the module there, with its trained tensors under
      its own names, in the dtype of the base.

    Args:
        model: the model. It may be merged.
        adapter: a name or several names. None: all adapters. Then the model has no trace of the engine: its classes,
            hooks, `requires_grad` flags, state dict and `save_pretrained` are those of an ordinary model.

    Returns:
        The same model object.

    Raises:
        PlanError: lists every reason: a rule that neither weights nor an ordinary module can hold, and an error of
            `merge`. The model is unchanged.
        SurgeryError: an unknown or idle adapter; an adapter that stays depends on a layer or a module that would go; a
            block of `using` or `route` is open; a part of the model was rewritten separately. The model is unchanged.

    Warns:
        SurgeryWarning: a model with `save_pretrained` is one that `from_pretrained` of its class can't build.
    """
    root, state = rewritten(model)
    check_unclaimed(root)
    names = list(dict.fromkeys(adapter_names(state, adapter)))
    _check_arguments(root, state, names)
    committed, problems = find_objections(root, state, names)
    if problems:
        raise PlanError(problems)
    replaced = [site for site in committed if site.replacement is not None]
    records = [record for record in state.structure if record.adapter in names]
    unplain = _unplain(root, records, replaced)
    with torch.no_grad(), Journal() as journal:
        keep_model(journal, root, state)
        flags = untied_flags(root, state)
        if hasattr(root, "save_pretrained"):
            separate_copies(root, [pair for record in records for pair in record.copies], journal)
        _fold(root, [site for site in committed if site.replacement is None and not site.merged], names, journal)
        forgotten = [(site.path, site.module, site.site) for site in committed]
        freezes = any(name not in names for name in state.freezing)
        flags |= replace_modules(root, state, replaced, freezes, journal)
        state.structure[:] = [record for record in state.structure if record not in records]
        forget_adapters(root, state, names, forgotten, flags, journal)
    if unplain:
        warnings.warn(
            f"from_pretrained of {class_of(root).__name__} does not build this model: {abbreviate(unplain)}. "
            "torch.save(model) keeps it as it is",
            SurgeryWarning,
            stacklevel=3,
        )
    return model


def _check_arguments(root: nn.Module, state: ModelState, names: Sequence[str]) -> None:
    if inner := records_in(root, below=True):
        raise SurgeryError(
            "part of this model has rules of its own",
            where=abbreviate(inner, "parts"),
            why="it was rewritten separately",
            fix="commit(part) first, for each of these parts",
        )
    idle = [name for name in names if not state.standing[name].live]
    if idle:
        raise SurgeryError(
            f"the adapter {idle[0]!r} is idle",
            why="a commit makes final what is live, and an idle adapter has no effect",
            fix=f"remove(model, {idle[0]!r}) or activate it first; or name the adapters to commit",
        )


def _unplain(root: nn.Module, records: Sequence[Restructuring], replaced: Sequence[CommittedSite]) -> list[str]:
    """Why the class of a model of transformers does not build the committed model; empty if it does."""
    if not hasattr(root, "save_pretrained"):
        return []
    return [reason for record in records for reason in record.unplain] + [
        f"{site.path} is a {type(site.replacement).__name__}, in the place of a {class_of(site.module).__name__}"
        for site in replaced
    ]


def _fold(root: nn.Module, folded: Sequence[CommittedSite], names: list[str], journal: Journal) -> None:
    """Fold the rules of these sites into the weights, and give the sites the class of what stays there."""
    owners, waiting = Owners(root), list[Any]()
    for here in folded:
        arguments = (owners, here.path, here.module, here.site, names, here.rules, MergeSettings(), journal)
        if is_offloaded(here.module):
            merge_offloaded_site(*arguments)
        else:
            merge_site(*arguments, waiting)
        staying = [applied for applied in here.site.live() if applied.adapter not in names]
        install_live(here.module, journal, live=staying)
    fold_together(waiting)
