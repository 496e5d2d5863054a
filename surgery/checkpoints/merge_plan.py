"""Plans a merge into files: the base, its model without weights, and what is to be merged. Nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from surgery.checkpoints.base_skeleton import Skeleton, base_skeleton, check_not_quantised
from surgery.checkpoints.checkpoint_files import CheckpointFiles, open_checkpoint
from surgery.checkpoints.dequantised_files import dequantised_files, quantisation_of
from surgery.checkpoints.loaded_adapters import load_adapters_on, sites_to_merge
from surgery.checkpoints.merge_units import MergeUnit, absent_error, merge_units
from surgery.checkpoints.unit_merge import MergeSite
from surgery.checkpoints.untied_tensors import check_shared, untie_shared
from surgery.errors import PlanError, SurgeryError
from surgery.state.parameter_owners import Owners
from surgery.state.records import model_state
from surgery.transaction.created_folder import check_new_folder

__all__ = ["MergePlan", "check_arguments", "check_meta", "check_outside", "plan_merge"]


@dataclass
class MergePlan:
    """What is merged into which files, before anything is written."""

    files: CheckpointFiles
    skeleton: Skeleton
    sites: list[MergeSite]
    units: list[MergeUnit]
    loaded: list[Any]
    untied: bool
    dequantised: bool = False


def check_arguments(
    base: Path,
    out: Path,
    sources: Sequence[Any],
    dtype: torch.dtype | None,
    keep_record: bool,
    weights: Sequence[float] | None,
    workers: int,
) -> None:
    """Raises `SurgeryError` for arguments that do not fit together, and for folders that can't be read or written."""
    if not sources:
        raise SurgeryError("there is no adapter to merge", fix="name a folder, a file or a repository")
    if wrong := [source for source in sources if not isinstance(source, (str, Path))]:
        what, fix = (
            f"{str(wrong[0])[:200]!r} is not an adapter",
            "name a folder, a file or a repository, or a list of them",
        )
        raise SurgeryError(what, why=f"it is a {type(wrong[0]).__name__}", fix=fix)
    if weights is not None and (isinstance(weights, (str, bytes)) or not isinstance(weights, Sequence)):
        raise SurgeryError(f"weights={weights!r} is not a list", fix="weights=[0.7, -0.3], one for each adapter")
    if weights is not None and len(weights) != len(sources):
        raise SurgeryError(f"there are {len(weights)} weights for {len(sources)} adapters")
    if not isinstance(workers, int) or workers < 1:
        raise SurgeryError(f"workers={workers!r} is not a number of threads", fix="workers=1, or more")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise SurgeryError(
            f"dtype={dtype!r} is not a dtype of weights", fix="torch.bfloat16, torch.float16 or torch.float32"
        )
    if dtype is not None and keep_record:
        why = "the files of the base have another dtype, which its weights can't be restored to from the result"
        raise SurgeryError("keep_record=True needs the dtype of the base", why=why, fix="leave out dtype=")
    if not base.is_dir():
        raise SurgeryError(f"{base} is not a folder", fix="name a folder with the base's config.json and weights")
    check_new_folder(out)
    check_outside(out, base, "the base's folder")


def check_quantised(quantised: str, keep_record: bool) -> None:
    """Raises `SurgeryError` for an unknown word, and for a merge whose record would be that of other weights."""
    if quantised == "requantise":
        fix = 'load the model, and merge_to(model, folder, quantised="requantise")'
        raise SurgeryError("weights are not quantised anew in files", why="their error must be seen first", fix=fix)
    if quantised not in ("refuse", "dequantise"):
        raise SurgeryError(f"quantised={quantised!r} is not known", fix="use 'refuse' or 'dequantise'")
    if quantised == "dequantise" and keep_record:
        why = "a record restores the weights that are merged into, and these are not those of the base's files"
        raise SurgeryError("keep_record=True can't restore codes", why=why, fix="keep the base's folder")


def check_outside(out: Path, folder: Path, what: str) -> None:
    """Raises `SurgeryError` if a result would lie in the folder that is read, whose files are copied into it."""
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise SurgeryError(f"the result can't be written into {what}", where=str(out), fix="name another folder")


def check_meta(model: Any) -> None:
    """Raises `SurgeryError` unless this is a model without weights and adapters, or None."""
    if model is None:
        return
    fix = 'with torch.device("meta"): model = …'
    if not isinstance(model, nn.Module):
        raise SurgeryError(f"model={type(model).__name__} is not a model", fix=fix)
    if model_state(model) is not None:
        raise SurgeryError("the model has adapters already", fix="give a new model, and name all adapters")
    if loaded := next((name for name, tensor in model.named_parameters() if not tensor.is_meta), None):
        why = "its weights would be replaced by those of the files"
        raise SurgeryError("the model is not on the meta device", where=loaded, why=why, fix=fix)


def plan_merge(
    base: Path,
    sources: Sequence[Any],
    names: Sequence[str],
    weights: Sequence[float] | None,
    model: nn.Module | None,
    untie: bool,
    same_base: bool,
    trust: bool,
    keep_record: bool,
    quantised: Literal["refuse", "dequantise"] = "refuse",
) -> MergePlan:
    """Opens the base, loads the adapters on its model without weights, and finds the units of work.

    Raises:
        SurgeryError: anything that makes the merge impossible.
    """
    check_meta(model)
    check_quantised(quantised, keep_record)
    dequantises = quantised == "dequantise" and bool(quantisation_of(base))
    if not dequantises:
        check_not_quantised(base)
    files = open_checkpoint(base)
    if dequantises:
        files = dequantised_files(files)
    if keep_record and files.pickled:
        fix = "save the base as safetensors files first"
        raise SurgeryError("keep_record=True needs safetensors files", why=".bin files can't be written again", fix=fix)
    skeleton = base_skeleton(files, model)
    loaded = load_adapters_on(skeleton.model, sources, names, weights, {"same_base": same_base, "trust": trust})
    sites = sites_to_merge(skeleton, names)
    owners = Owners(skeleton.model)
    problems, shared = check_shared(sites, skeleton, files, owners, untie)
    if problems:
        raise PlanError(problems)
    if shared:
        untie_shared(skeleton, shared, owners)
        for site in sites:
            site.aliases = skeleton.aliases
    units = merge_units(sites, skeleton)
    if without := [unit.sites[0].path for unit in units if not unit.disk]:
        raise absent_error(without[0])
    return MergePlan(files, skeleton, sites, units, loaded, bool(shared), dequantises)
