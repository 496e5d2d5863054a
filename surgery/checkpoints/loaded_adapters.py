"""Puts adapters on a base without weights, and checks that they can be merged into files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from surgery.checkpoints.base_skeleton import Skeleton
from surgery.checkpoints.unit_merge import MergeSite
from surgery.errors import NotInFilesError, PlanError, SurgeryError
from surgery.lifecycle.activation import activate, deactivate
from surgery.merging.merge_objections import objections_to_merge
from surgery.state.records import require_state, sites
from surgery.storage.load import load_adapter

__all__ = ["load_adapters_on", "names_of", "sites_to_merge"]


def names_of(sources: Sequence[Any]) -> list[str]:
    """A name for each adapter: that of its folder or file."""
    names = []
    for index, source in enumerate(sources):
        path = Path(source) if isinstance(source, (str, Path)) else Path(f"adapter{index}")
        name = (path.name if path.is_dir() else path.stem) or path.resolve().name
        names.append(name.replace(".", "_") or f"adapter{index}")
    return [name if names.count(name) == 1 else f"{name}{index}" for index, name in enumerate(names)]


def load_adapters_on(
    model: nn.Module,
    sources: Sequence[Any],
    names: Sequence[str],
    weights: Sequence[float] | None,
    options: dict[str, Any],
) -> list[Any]:
    """Loads adapters, all live at the end. Returns the report of each."""
    reports = []
    for source, name in zip(sources, names, strict=True):
        if reports:
            with suppress(SurgeryError):  # one that changed the base's weights stays live
                deactivate(model)
        try:
            reports.append(load_adapter(model, source, name, **options))
        except SurgeryError as error:
            for problem in (error, *getattr(error, "problems", ())):
                problem.fix = problem.fix and problem.fix.replace(
                    "load_adapter(…, same_base", "merge_files(…, same_base"
                )
            raise
    if len(names) > 1 or weights is not None:
        activate(model, list(names), weights=weights)
    return reports


def sites_to_merge(skeleton: Skeleton, names: Sequence[str]) -> list[MergeSite]:
    """Returns the sites with the rules to merge.

    Raises:
        PlanError: one problem for each site that can't be merged.
        NotInFilesError: an adapter changes the model's structure.
    """
    model = skeleton.model
    state = require_state(model)
    if state.structure:
        adapters = dict.fromkeys(record.adapter for record in state.structure)
        raise NotInFilesError(
            f"{', '.join(map(repr, adapters))} can't be merged into files",
            why="it changes the model's structure, so the files would have other tensors",
            fix="load the model and the adapter, and merge_to(model, folder)",
        )
    chosen_at = state.rules_at(list(names))
    merged: list[MergeSite] = []
    problems: list[SurgeryError] = []
    for path, module, site in sites(model):
        chosen = chosen_at.get(id(module))
        if not chosen:
            continue
        problems += objections_to_merge(path, module, site, chosen, chosen)
        merged.append(MergeSite(path, module, site, chosen, skeleton.aliases))
    if problems:
        raise PlanError(problems)
    return merged
