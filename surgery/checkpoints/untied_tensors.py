"""Gives sites whose weight is shared a weight of their own in the files, as `merge_to(…, untie=True)` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from surgery.checkpoints.base_skeleton import Skeleton, tensor_places
from surgery.checkpoints.checkpoint_files import CheckpointFiles
from surgery.checkpoints.merge_units import read_tensor
from surgery.checkpoints.name_map import NameGroup
from surgery.checkpoints.unit_merge import MergeSite, changed_names
from surgery.errors import MergeError, SurgeryError
from surgery.forward.parameter_view import tensor_at
from surgery.merging.site_folding import check_foldable
from surgery.merging.site_merge import owner_of
from surgery.model_edits.tied_parts import FLAG
from surgery.state.parameter_owners import Owners
from surgery.state.tied_weights import say_untied, why_not_said
from surgery.transaction.undo_log import Journal

__all__ = ["check_shared", "untie_shared", "untied_config"]


def check_shared(
    sites: Sequence[MergeSite], skeleton: Skeleton, files: CheckpointFiles, owners: Owners, untie: bool
) -> tuple[list[SurgeryError], list[tuple[MergeSite, str]]]:
    """Finds the shared weights that rules change: as problems, or with `untie` as sites with the weight's name.

    Only the rules of sites with shared weights run here.
    """
    problems: list[SurgeryError] = []
    shared: list[tuple[MergeSite, str]] = []
    for site in sites:
        if not any(len(owners.of(parameter)) > 1 for parameter in site.module.parameters(recurse=True)):
            continue
        try:
            changes = changed_names(site, lambda name: read_tensor(name, skeleton, files, None))
            for name, change in changes.items():
                check_foldable(owners, site.module, name, change, site.path, untie)
                parameter = tensor_at(site.module, name)
                if isinstance(parameter, nn.Parameter) and len(owners.of(parameter)) > 1:
                    shared.append((site, name))
        except SurgeryError as error:
            if error.fix is not None:
                error.fix = error.fix.replace("merge(model, untie=True)", "merge_files(…, untie=True)")
            problems.append(error)
    return problems, shared


def untie_shared(skeleton: Skeleton, shared: Sequence[tuple[MergeSite, str]], owners: Owners) -> None:
    """Gives these sites parameters of their own, and adds the names that the files need for them."""
    before = dict(skeleton.aliases)
    for site, name in shared:
        old = tensor_at(site.module, name)
        if len(owners.of(old)) < 2:
            continue
        owner, last = owner_of(site.module, name), name.rpartition(".")[2]
        new = nn.Parameter(old.detach(), requires_grad=old.requires_grad)
        owner._parameters[last] = new
        owners.note_replacement(owner, last, old, new)
    say_untied(skeleton.model, Journal())
    if why := why_not_said(skeleton.model):
        fix = "merge(model, untie=True) and keep this model; or exclude the tied modules from the rule's targets"
        raise MergeError("the checkpoint of this model can't hold untied weights", why=why, fix=fix)
    places = tensor_places(skeleton.model)
    for name, source in before.items():
        apart = places[name][2] is not places[source][2]
        if name not in skeleton.names.of_memory and apart:
            skeleton.names.add(NameGroup((name,), (name,), source=skeleton.names.of_memory[source]))
    skeleton.link_names()
    for site in {id(site): site for site, _ in shared}.values():
        site.aliases = skeleton.aliases


def untied_config(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The contents of `config.json` for a model that was untied."""
    data = dict(config)
    settings = getattr(model, "config", None)
    if settings is None:
        return data
    if not getattr(settings, FLAG, False):
        data[FLAG] = False
    for name, part in list(data.items()):
        inner = getattr(settings, name, None)
        if isinstance(part, dict) and inner is not None and FLAG in part and not getattr(inner, FLAG, True):
            data[name] = {**part, FLAG: False}
    return data
